// The vocabulary and the merges of a BPE model, as tables that are read where they lie in tokenizer.bin (slm.web.vocabulary has the
// format). Gives the same tokens as the BPE model of the Rust library tokenizers.
import { Problem } from "./problem.js";

const MARK = 0x316d6c73;
const HEAD = 5; // numbers before the tables
// Positions in a word are below this; ranks times this are exact in a float64.
const POSITIONS = 2 ** 29;

// Returns the rules and the vocabulary of the contents of tokenizer.bin: {rules: tokenizer.json without both tables, vocabulary}.
export function unpacked(bytes) {
  const words = new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.length >> 2);
  const [mark, head, tokens, length, merges] = words;
  let at = HEAD;
  const take = (count) => words.subarray(at, (at += count));
  const parts = [tokens, tokens + 1, tokens, tokens + 1, merges, merges, merges].map(take);
  const text = bytes.subarray(4 * at, 4 * at + length);
  if (mark !== MARK || 4 * at + length + head !== bytes.length) {
    throw new Problem("the tokenizer and the page are of different versions", "make the site again with slm web");
  }
  const rules = JSON.parse(new TextDecoder().decode(bytes.subarray(4 * at + length)));
  return { rules, vocabulary: new Vocabulary(rules.model, parts, text) };
}

export class Vocabulary {
  #ids;
  #starts;
  #sorted;
  #merges;
  #rights;
  #ranks;
  #results;
  #text;
  #model;
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  #encoder = new TextEncoder();
  #scratch = new Uint8Array(256);

  // model: the rules of the BPE model; parts: the tables; text: the bytes of the tokens.
  constructor(model, parts, text) {
    this.#model = model;
    [this.#ids, this.#starts, this.#sorted, this.#merges, this.#rights, this.#ranks, this.#results] = parts;
    this.#text = text;
  }

  // Returns the id of a token with exactly this spelling, or undefined.
  id(token) {
    return this.#ids[this.#number(token)];
  }

  // Returns the spelling of a token, or undefined.
  token(id) {
    const number = this.#ids[id] === id ? id : search(this.#ids, 0, this.#ids.length, id);
    return number < 0 ? undefined : this.#spelled(number);
  }

  // Returns the tokens of a word, by their spelling.
  encode(word) {
    if (word === "") return [];
    if (this.#model.ignore_merges && this.#number(word) >= 0) return [word];
    return this.#merged(this.#symbols(word)).map((number) => this.#spelled(number));
  }

  #spelled(number) {
    return this.#decoder.decode(this.#text.subarray(this.#starts[number], this.#starts[number + 1]));
  }

  // Returns the number of a token, or -1.
  #number(token) {
    if (this.#scratch.length < 3 * token.length) this.#scratch = new Uint8Array(6 * token.length);
    const { written } = this.#encoder.encodeInto(token, this.#scratch);
    let [low, high] = [0, this.#sorted.length - 1];
    while (low <= high) {
      const middle = (low + high) >> 1;
      const order = this.#compared(this.#sorted[middle], written);
      if (order === 0) return this.#sorted[middle];
      if (order < 0) low = middle + 1;
      else high = middle - 1;
    }
    return -1;
  }

  // Returns a number below, equal to or above zero: the order of a token and of the first bytes of the scratch buffer.
  #compared(number, written) {
    const [start, end] = [this.#starts[number], this.#starts[number + 1]];
    const common = Math.min(end - start, written);
    for (let i = 0; i < common; i++) {
      const difference = this.#text[start + i] - this.#scratch[i];
      if (difference) return difference;
    }
    return end - start - written;
  }

  // Returns the numbers of a word's characters, or of their bytes, or of the unknown token, before merges.
  #symbols(word) {
    const { continuing_subword_prefix: prefix, end_of_word_suffix: suffix, unk_token: unknown, byte_fallback, fuse_unk } = this.#model;
    const characters = Array.from(word);
    const found = [];
    let pending = false; // an unknown token that may grow
    for (const [i, character] of characters.entries()) {
      const spelled = (i > 0 && prefix ? prefix : "") + character + (i === characters.length - 1 && suffix ? suffix : "");
      const number = this.#number(spelled);
      if (number >= 0) {
        if (pending) found.push(this.#unknown());
        pending = false;
        found.push(number);
        continue;
      }
      const bytes = byte_fallback ? this.#bytes(spelled) : [-1];
      if (!bytes.includes(-1)) found.push(...bytes);
      else if (typeof unknown === "string") {
        if (pending && !fuse_unk) found.push(this.#unknown());
        pending = true;
      }
    }
    if (pending) found.push(this.#unknown());
    return found;
  }

  #bytes(text) {
    const hexadecimal = (byte) => byte.toString(16).toUpperCase().padStart(2, "0");
    return Array.from(this.#encoder.encode(text), (byte) => this.#number(`<0x${hexadecimal(byte)}>`));
  }

  #unknown() {
    const number = this.#number(this.#model.unk_token);
    if (number >= 0) return number;
    throw new Problem("the model's tokenizer does not cover this text", "remove unusual characters");
  }

  // Merges neighbours, the pair of the lowest rank first, and of equal pairs the first; returns the numbers that remain.
  #merged(symbols) {
    const { length } = symbols;
    const numbers = Int32Array.from(symbols); // -1: merged into an earlier one
    const next = Int32Array.from(numbers, (_, i) => (i + 1 < length ? i + 1 : -1));
    const previous = Int32Array.from(numbers, (_, i) => i - 1);
    const queue = new Queue(length);
    const add = (at) => {
      const merge = at < 0 || next[at] < 0 ? -1 : this.#merge(numbers[at], numbers[next[at]]);
      if (merge >= 0) queue.push(this.#ranks[merge] * POSITIONS + at, this.#results[merge]);
    };
    for (let at = 0; at < length; at++) add(at);
    while (queue.pop()) {
      const at = queue.key % POSITIONS;
      if (numbers[at] < 0 || next[at] < 0) continue;
      const after = next[at];
      const merge = this.#merge(numbers[at], numbers[after]);
      if (merge < 0 || this.#results[merge] !== queue.value) continue; // the pair has changed
      numbers[at] = queue.value;
      numbers[after] = -1;
      next[at] = next[after];
      if (next[at] >= 0) previous[next[at]] = at;
      add(previous[at]);
      add(at);
    }
    return Array.from(numbers).filter((number) => number >= 0);
  }

  // Returns the place of the merge of two tokens, or -1.
  #merge(left, right) {
    return search(this.#rights, this.#merges[left], this.#merges[left + 1], right);
  }
}

// Returns the place of a number in a sorted part of an array, or -1.
function search(sorted, start, end, wanted) {
  let [low, high] = [start, end - 1];
  while (low <= high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] === wanted) return middle;
    if (sorted[middle] < wanted) low = middle + 1;
    else high = middle - 1;
  }
  return -1;
}

// A binary heap of numbers with a value each; `pop` takes the smallest into `key` and `value`.
class Queue {
  key = 0;
  value = 0;
  #keys;
  #values;
  #size = 0;

  // most: how many pairs there may be at the start. Each merge then adds at most two and takes one.
  constructor(most) {
    this.#keys = new Float64Array(3 * most + 3);
    this.#values = new Int32Array(3 * most + 3);
  }

  push(key, value) {
    let at = this.#size++;
    while (at > 0) {
      const parent = (at - 1) >> 1;
      if (this.#keys[parent] <= key) break;
      this.#move(parent, at);
      at = parent;
    }
    this.#put(at, key, value);
  }

  pop() {
    if (this.#size === 0) return false;
    [this.key, this.value] = [this.#keys[0], this.#values[0]];
    this.#size -= 1;
    const [key, value] = [this.#keys[this.#size], this.#values[this.#size]];
    let at = 0;
    for (;;) {
      let child = 2 * at + 1;
      if (child + 1 < this.#size && this.#keys[child + 1] < this.#keys[child]) child += 1;
      if (child >= this.#size || this.#keys[child] >= key) break;
      this.#move(child, at);
      at = child;
    }
    this.#put(at, key, value);
    return true;
  }

  #move(from, to) {
    this.#put(to, this.#keys[from], this.#values[from]);
  }

  #put(at, key, value) {
    this.#keys[at] = key;
    this.#values[at] = value;
  }
}
