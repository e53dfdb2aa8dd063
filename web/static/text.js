// Converts text to token ids and back, also incrementally; gives the same results as slm.core.tokenizer.
import { Problem } from "./problem.js";
import { ByteFallbackDecoder, Tokenizer, WhitespacePreTokenizer, WhitespaceSplitPreTokenizer } from "./vendor/tokenizers.min.mjs";

// Tokens of slm's own models, in addition to those named in tokenizer_config.json.
const SPECIAL_TOKENS = ["<|endoftext|>", "<start_of_turn>", "<end_of_turn>", "<pad>"];
const CONTROL = /^(?:[<[][|｜][^]*[|｜][>\]]|<[/A-Za-z0-9]*_[/A-Za-z0-9_]*>|\[\/?[A-Z_]+\])$/;
const MARKER = /[<[](?=[^<>[\]]{0,64}[A-Za-z])[^\s<>[\]{}'"]{1,64}[>\]]/g;
const BYTE = /^<0x[0-9A-Fa-f]{2}>$/;
const UNKNOWN = "\u{10fffd}"; // a character that vocabularies do not contain

const REPLACEMENT = "\ufffd"; // replaces bytes that are not a character

// Decodes a run of bytes as a whole: if it is not valid UTF-8, each byte becomes a REPLACEMENT, as in the Rust library. This
// library would decode the valid parts of the run.
ByteFallbackDecoder.prototype.decode_chain = (tokens) => {
  const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  const found = [];
  let bytes = [];
  const flush = () => {
    try {
      if (bytes.length) found.push(utf8.decode(Uint8Array.from(bytes)));
    } catch {
      found.push(...bytes.map(() => REPLACEMENT));
    }
    bytes = [];
  };
  for (const token of tokens) {
    const byte = /^<0x([0-9A-F]{2})>$/i.exec(token);
    if (byte) bytes.push(parseInt(byte[1], 16));
    else {
      flush();
      found.push(token);
    }
  }
  flush();
  return found;
};

// Letters, digits and white space as in the Rust library: this library would take only those of JavaScript's \w and \s.
const WORDS = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]+|[^\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}\p{White_Space}]+/gu;
WhitespacePreTokenizer.prototype.pre_tokenize_text = (text) => text.match(WORDS) ?? [];
WhitespaceSplitPreTokenizer.prototype.pre_tokenize_text = (text) => text.match(/\P{White_Space}+/gu) ?? [];

const trailingSpaces = (text) => Array.from(text).length - Array.from(text.trimEnd()).length;
const leadingSpaces = (text) => Array.from(text).length - Array.from(text.trimStart()).length;
const utf8Length = (text) => new TextEncoder().encode(text).length;
// Returns the number of the character of each UTF-8 byte of a text.
const characterEdges = (text) => Array.from(text).flatMap((character, i) => Array(utf8Length(character)).fill(i));

export class Text {
  #rules;
  #config;
  #vocabulary;
  #tokenizer;
  #addedIds;
  #addedTokens;
  #literal = null;
  #forbidden = null; // ids that plain text must not form
  #unknown = null;

  // rules: the contents of tokenizer.json, without the tables of its BPE model if `vocabulary` has them; config: the contents of
  // tokenizer_config.json.
  constructor({ rules, vocabulary = null }, config) {
    [this.#rules, this.#config, this.#vocabulary] = [rules, config, vocabulary];
    this.#tokenizer = this.#made(rules);
    this.#addedIds = new Map(rules.added_tokens.map((token) => [token.content, token.id]));
    this.#addedTokens = new Map(rules.added_tokens.map((token) => [token.id, token.content]));
    this.specialIds = new Set(rules.added_tokens.filter((token) => token.special).map((token) => token.id));
    this.added = new Set(this.#addedTokens.keys());
    this.controls = this.#controlIds(); // ids that have a meaning besides their characters: Tokenizer.control_ids in Python
  }

  // Returns the ids of a prompt: with the tokens of the post-processor, and with special tokens for their text.
  encode(text) {
    return this.#tokenizer.encode(text).ids;
  }

  // Returns the ids of plain text: without the tokens of the post-processor; text of control tokens is encoded as plain characters.
  // besides: further ids to avoid.
  encodeLiteral(text, besides = new Set()) {
    const plain = this.#plain(text);
    if (!plain.some((id) => this.controls.has(id) || besides.has(id))) return plain;
    this.#literal ??= this.#withoutControls();
    this.#forbidden ??= this.#forbiddenIds();
    return this.#avoiding(text, besides);
  }

  id(token) {
    return this.#addedIds.get(token) ?? this.#tokenizer.token_to_id(token);
  }

  decode(ids) {
    return this.#decoded(ids.filter((id) => !this.specialIds.has(id)));
  }

  // Returns the ids that can be control tokens: not white space or a single character, which occur in any text.
  lengthy(ids) {
    return new Set([...ids].filter((id) => this.spelled(id).trim().length > 1));
  }

  // Returns the text of one token, also of a special token.
  spelled(id) {
    return this.#decoded([id, id]).slice(this.#decoded([id]).length);
  }

  // Returns the ids of a rendered chat template: without the tokens of the post-processor.
  encodeRendered(text) {
    return this.#plain(text);
  }

  // Returns the tokens of a rendered text that are among some ids: [id, start, end], in characters (code points). The unknown
  // token counts only where its text is spelled.
  places(text, wanted) {
    const tokens = this.#tokenizer;
    const sections = tokens.splitter_unnormalized.split(text);
    const found = [];
    let at = 0;
    for (const [i, section] of sections.entries()) {
      const length = Array.from(section).length;
      const added = tokens.added_tokens_map.get(section);
      if (added) {
        const before = added.lstrip && i > 0 ? trailingSpaces(sections[i - 1]) : 0;
        const after = added.rstrip && i + 1 < sections.length ? leadingSpaces(sections[i + 1]) : 0;
        if (wanted.has(added.id)) found.push([added.id, at - before, at + length + after]);
      } else if (length) found.push(...this.#placesWithin(section, wanted).map(([id, start, end]) => [id, at + start, at + end]));
      at += length;
    }
    return found;
  }

  // Returns the same for a text without added tokens that are matched before normalization.
  #placesWithin(section, wanted) {
    const tokens = this.#tokenizer.encode_text(section);
    const added = this.#tokenizer.added_tokens_map;
    const known = (token) => added.get(token)?.id ?? this.id(token);
    const counts = (token) => wanted.has(known(token)) && (added.has(token) || !this.#unknownIds().has(known(token)));
    if (!tokens.some(counts)) return [];
    const normalized = this.#tokenizer.normalizer === null ? section : this.#tokenizer.normalizer(section);
    const edges = characterEdges(normalized);
    const bytes = this.#inBytes();
    const found = [];
    let at = 0;
    for (const token of tokens) {
      const size = added.has(token) ? utf8Length(token) : bytes ? Array.from(token).length : BYTE.test(token) ? 1 : utf8Length(token);
      if (counts(token)) found.push([known(token), edges[at], edges[at + size - 1] + 1]);
      at += size;
    }
    if (at === edges.length && Array.from(normalized).length === Array.from(section).length) return found;
    throw new Problem("the page cannot render a conversation with this model's tokenizer", "the model can still continue text");
  }

  // Whether tokens are spelled in characters that stand for bytes.
  #inBytes() {
    const { pre_tokenizer } = this.#rules;
    return [pre_tokenizer, ...(pre_tokenizer?.pretokenizers ?? [])].some((each) => each?.type === "ByteLevel");
  }

  // Returns the control ids that any text may contain: the unknown token's, unless that token has another role too.
  #unknownIds() {
    if (this.#unknown === null) {
      this.#literal ??= this.#withoutControls();
      const { bos_token, eos_token } = this.#config;
      const meant = new Set([...SPECIAL_TOKENS, ...named({ bos_token, eos_token })].map((token) => this.id(token)));
      const found = new Set(this.#literal.encode(UNKNOWN, { add_special_tokens: false }).ids);
      if (typeof this.#rules.model.unk_token === "string") found.add(this.id(this.#rules.model.unk_token));
      this.#unknown = new Set([...this.controls].filter((id) => found.has(id) && !meant.has(id)));
    }
    return this.#unknown;
  }

  #plain(text) {
    return this.#tokenizer.encode(text, { add_special_tokens: false }).ids;
  }

  // Splits a text within a control token that the vocabulary forms from plain characters.
  #avoiding(text, besides) {
    const ids = this.#literal.encode(text, { add_special_tokens: false }).ids;
    const avoided = (id) => this.#forbidden.has(id) || besides.has(id);
    if (!ids.some(avoided)) return ids;
    const characters = Array.from(text);
    if (characters.length <= 1) return ids.filter((id) => !avoided(id));
    const middle = characters.length >> 1;
    return [characters.slice(0, middle), characters.slice(middle)].flatMap((half) => this.#avoiding(half.join(""), besides));
  }

  #withoutControls() {
    const added_tokens = this.#rules.added_tokens.filter((token) => !this.controls.has(token.id));
    return this.#made({ ...this.#rules, added_tokens, post_processor: null });
  }

  // Returns the library's tokenizer of some rules; all that this object makes share the vocabulary.
  #made(rules) {
    const vocabulary = this.#vocabulary;
    if (vocabulary === null) return new Tokenizer(rules, this.#config);
    const made = new Tokenizer({ ...rules, model: { ...rules.model, vocab: {}, merges: [] } }, this.#config);
    const encode = (words) => words.flatMap((word) => vocabulary.encode(word));
    const { unk_token } = rules.model;
    const unk_token_id = typeof unk_token === "string" ? vocabulary.id(unk_token) : undefined;
    made.model = Object.assign(encode, { tokens_to_ids: { get: (token) => vocabulary.id(token) }, unk_token_id });
    return made;
  }

  #decoded(ids) {
    const { decoder, model } = this.#tokenizer;
    const spelled = (id) => this.#addedTokens.get(id) ?? (this.#vocabulary ? this.#vocabulary.token(id) : model.vocab[id]);
    const tokens = ids.map(spelled).filter((token) => token !== undefined);
    if (tokens.length === 0) return "";
    return decoder ? decoder(tokens) : tokens.join(" ");
  }

  #controlIds() {
    const template = typeof this.#config.chat_template === "string" ? this.#config.chat_template : "";
    const isControl = (token) => token.trim().length > 1 && (template.includes(token.trim()) || CONTROL.test(token.trim()));
    const controls = this.#rules.added_tokens.filter((token) => (token.special || isControl(token.content)) && !BYTE.test(token.content));
    const markers = [...new Set(template.match(MARKER))].map((each) => this.#plain(each)).filter((ids) => ids.length === 1);
    const tokens = [...SPECIAL_TOKENS, ...named(this.#config)].map((token) => this.id(token)).filter((id) => id != null);
    return new Set([...controls.map((token) => token.id), ...this.lengthy([...markers.flat(), ...tokens])]);
  }

  #forbiddenIds() {
    return new Set([...this.controls].filter((id) => !this.#unknownIds().has(id)));
  }
}

// Returns the special tokens named in a tokenizer_config.json, as strings or in objects.
function named(config) {
  const values = Object.entries(config).filter(([key]) => key.endsWith("_token")).map(([, value]) => value);
  for (const key of ["additional_special_tokens", "extra_special_tokens"]) values.push(...Object.values(config[key] ?? {}));
  values.push(...Object.values(config.added_tokens_decoder ?? {}).filter((token) => token?.special === true));
  return values.map((value) => (typeof value === "string" ? value : value?.content)).filter((each) => typeof each === "string");
}

export class TextStream {
  #text;
  #shown;
  #before = []; // the tokens of the last piece: decoders join and strip at the start of a text
  #held = [];

  // shown: special tokens whose spelling is part of the text, such as the marks of calls.
  constructor(text, shown = new Set()) {
    this.#text = text;
    this.#shown = shown;
  }

  // Takes a token and returns the characters that it completes, often none.
  push(token) {
    if (this.#text.specialIds.has(token)) return this.#shown.has(token) ? this.finish() + this.#text.spelled(token) : "";
    this.#held.push(token);
    const piece = this.#piece();
    if (piece.endsWith(REPLACEMENT)) return ""; // perhaps the start of a character
    this.#before = this.#held;
    this.#held = [];
    return piece;
  }

  // Returns the rest of a text that ended within a character.
  finish() {
    const piece = this.#piece();
    this.#held = [];
    return piece;
  }

  #piece() {
    const before = this.#text.decode(this.#before);
    const both = this.#text.decode([...this.#before, ...this.#held]);
    return both.startsWith(before) ? both.slice(before.length) : this.#text.decode(this.#held);
  }
}
