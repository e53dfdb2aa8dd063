// Text and JSON as Python reads and writes them, so that prompts have the same tokens as in slm.core. Objects are Maps, which
// keep the order of their keys; whole numbers are numbers or BigInts, and other numbers are Floats: 1.0 is not written as 1.

const SPACES = "\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
// White space as in Python's str.isspace and in \s of Python's regular expressions.
export const SPACE = `[${SPACES}]`;
const LEADING = new RegExp(`^${SPACE}+`);
const TRAILING = new RegExp(`${SPACE}+$`);
const ANY_SPACE = new RegExp(SPACE);
const NUMBER = /(-?(?:0|[1-9][0-9]*))(\.[0-9]+)?([eE][-+]?[0-9]+)?/y;
const CHUNK = /[^"\\\x00-\x1f]*/y;
const ESCAPES = { '"': '"', "\\": "\\", "/": "/", b: "\b", f: "\f", n: "\n", r: "\r", t: "\t" };
const WORDS = [["null", null], ["true", true], ["false", false]];
const CONSTANTS = [["NaN", NaN], ["Infinity", Infinity], ["-Infinity", -Infinity]];
// Python's limit of the digits of a whole number.
const MOST_DIGITS = 4300;
// Deeper values are an error, as in Python, whose own limit depends on the stack.
const DEEPEST = 900;

export class Float {
  constructor(value) {
    this.value = value;
  }

  toString() {
    return floatText(this.value);
  }
}

export class JsonError extends Error {}

export const isSpace = (character) => ANY_SPACE.test(character);
export const stripStart = (text) => text.replace(LEADING, "");
export const stripEnd = (text) => text.replace(TRAILING, "");
export const strip = (text) => stripEnd(stripStart(text));

// Returns the value of a JSON text. constants: whether NaN and Infinity are values too.
export function parse(text, { constants = false } = {}) {
  const begin = skipped(text, 0);
  const [value, end] = parseAt(text, begin, { constants });
  if (skipped(text, end) !== text.length) throw new JsonError("text after the value");
  return value;
}

// Returns the value that begins at a position, and its end.
export function parseAt(text, at, { constants = false } = {}) {
  const reader = new Reader(text, at, constants);
  return [reader.value(0), reader.at];
}

// Returns the JSON text of a value, spelled as Python's json.dumps(value, ensure_ascii=False) spells it.
// indent: spaces of each level, or null for one line; separators: [between items, after keys].
export function dumps(value, { indent = null, separators = null, sortKeys = false, ascii = false } = {}) {
  const [between, after] = separators ?? [indent === null ? ", " : ",", ": "];
  const quoted = (text) => (ascii ? JSON.stringify(text).replace(/[\x7f-\uffff]/g, escaped) : JSON.stringify(text));
  const list = (open, close, parts, depth) => {
    if (!parts.length) return open + close;
    if (indent === null) return open + parts.join(between) + close;
    const line = (level) => `\n${" ".repeat(indent * level)}`;
    return `${open}${line(depth + 1)}${parts.join(between + line(depth + 1))}${line(depth)}${close}`;
  };
  const written = (each, depth) => {
    if (typeof each === "string") return quoted(each);
    if (each instanceof Float) return constantText(each.value) ?? floatText(each.value);
    if (Array.isArray(each)) return list("[", "]", each.map((item) => written(item, depth + 1)), depth);
    if (!(each instanceof Map)) return String(each);
    const entries = [...each];
    if (sortKeys) entries.sort(([a], [b]) => compareText(a, b));
    return list("{", "}", entries.map(([key, item]) => quoted(key) + after + written(item, depth + 1)), depth);
  };
  return written(value, 0);
}

// Compares texts by their code points, as Python does.
export function compareText(a, b) {
  const [left, right] = [Array.from(a), Array.from(b)];
  for (let i = 0; i < Math.min(left.length, right.length); i++) {
    if (left[i] !== right[i]) return left[i].codePointAt(0) - right[i].codePointAt(0);
  }
  return left.length - right.length;
}

// Returns how deep a value is nested; a number has the depth 1.
export function depth(value) {
  let deepest = 0;
  for (let level = [value]; level.length; deepest++) {
    level = level.flatMap((each) => (each instanceof Map ? [...each.values()] : Array.isArray(each) ? each : []));
  }
  return deepest;
}

// Returns whether all texts of a value are Unicode, and all numbers finite.
export function isValid(value) {
  if (typeof value === "string") return !/\p{Surrogate}/u.test(value);
  if (value instanceof Float) return Number.isFinite(value.value);
  if (value instanceof Map) return [...value].every(([key, each]) => isValid(key) && isValid(each));
  return !Array.isArray(value) || value.every(isValid);
}

// Returns a value with plain objects as Maps, such as messages; numbers with a fraction become Floats.
export function fromObject(value) {
  if (Array.isArray(value)) return value.map(fromObject);
  if (typeof value === "number" && !Number.isInteger(value)) return new Float(value);
  if (value === null || typeof value !== "object" || value instanceof Map || value instanceof Float) return value;
  return new Map(Object.entries(value).map(([key, each]) => [key, fromObject(each)]));
}

// Returns a number as Python's repr writes it.
function floatText(value) {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "nan" : value > 0 ? "inf" : "-inf";
  if (Object.is(value, -0)) return "-0.0";
  const [digits, power] = value.toExponential().split("e");
  const exponent = Number(power);
  if (value !== 0 && (exponent < -4 || exponent >= 16)) {
    return `${digits}e${exponent < 0 ? "-" : "+"}${String(Math.abs(exponent)).padStart(2, "0")}`;
  }
  if (Number.isInteger(value)) return `${value}.0`;
  if (exponent >= 0 || Math.abs(value) >= 1e-6) return String(value);
  return value.toFixed(digits.replace(/[-.]/g, "").length - 1 - exponent);
}

const constantText = (value) => (Number.isFinite(value) ? null : Number.isNaN(value) ? "NaN" : value > 0 ? "Infinity" : "-Infinity");
const escaped = (character) => (character === "\x7f" ? character : `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`);

function skipped(text, at) {
  while (at < text.length && " \t\n\r".includes(text[at])) at += 1;
  return at;
}

class Reader {
  constructor(text, at, constants) {
    this.text = text;
    this.at = at;
    this.words = constants ? [...WORDS, ...CONSTANTS] : WORDS;
  }

  value(level) {
    if (level > DEEPEST) throw new JsonError("nested too deeply");
    const character = this.text[this.at];
    if (character === '"') return this.#string();
    if (character === "{") return this.#object(level);
    if (character === "[") return this.#array(level);
    for (const [word, value] of this.words) {
      if (this.text.startsWith(word, this.at)) {
        this.at += word.length;
        return typeof value === "number" ? new Float(value) : value;
      }
    }
    return this.#number();
  }

  #skip() {
    this.at = skipped(this.text, this.at);
  }

  #take(character) {
    const found = this.text[this.at] === character;
    if (found) this.at += 1;
    return found;
  }

  #object(level) {
    const found = new Map();
    this.at += 1;
    this.#skip();
    if (this.#take("}")) return found;
    for (;;) {
      if (this.text[this.at] !== '"') throw new JsonError("a key is missing");
      const key = this.#string();
      this.#skip();
      if (!this.#take(":")) throw new JsonError("a colon is missing");
      this.#skip();
      found.set(key, this.value(level + 1));
      this.#skip();
      if (this.#take("}")) return found;
      if (!this.#take(",")) throw new JsonError("a comma is missing");
      this.#skip();
    }
  }

  #array(level) {
    const found = [];
    this.at += 1;
    this.#skip();
    if (this.#take("]")) return found;
    for (;;) {
      found.push(this.value(level + 1));
      this.#skip();
      if (this.#take("]")) return found;
      if (!this.#take(",")) throw new JsonError("a comma is missing");
      this.#skip();
    }
  }

  #string() {
    let found = "";
    this.at += 1;
    for (;;) {
      CHUNK.lastIndex = this.at;
      const chunk = CHUNK.exec(this.text)[0];
      found += chunk;
      this.at += chunk.length;
      if (this.#take('"')) return found;
      if (!this.#take("\\")) throw new JsonError("a text does not end, or has a control character");
      const letter = this.text[this.at++];
      if (letter === "u") {
        const hex = this.text.slice(this.at, this.at + 4);
        if (!/^[0-9a-fA-F]{4}$/.test(hex)) throw new JsonError("an escape is invalid");
        found += String.fromCharCode(parseInt(hex, 16));
        this.at += 4;
      } else if (Object.hasOwn(ESCAPES, letter ?? "")) found += ESCAPES[letter];
      else throw new JsonError("an escape is invalid");
    }
  }

  #number() {
    NUMBER.lastIndex = this.at;
    const found = NUMBER.exec(this.text);
    if (found === null) throw new JsonError("no value");
    this.at += found[0].length;
    const [whole, integer, fraction, exponent] = found;
    if (fraction !== undefined || exponent !== undefined) return new Float(Number(whole));
    if (integer.length > MOST_DIGITS) throw new JsonError("a number is too long");
    const value = Number(integer);
    return Number.isSafeInteger(value) ? value + 0 : BigInt(integer);
  }
}
