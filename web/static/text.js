// Text to token ids and back, and text as it streams; the same as slm.core.tokenizer.
import { ByteFallbackDecoder, Tokenizer } from "./vendor/tokenizers.min.mjs";

const REPLACEMENT = "\ufffd"; // stands in a text for bytes that are no character

// Bytes in a row that are no whole characters are one REPLACEMENT each, as the Rust library has it; this one would show what it can.
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

export class Text {
  #json;
  #config;
  #tokenizer;
  #literal = null;
  #special;

  // json: the contents of tokenizer.json; config: those of tokenizer_config.json.
  constructor(json, config) {
    this.#json = json;
    this.#config = config;
    this.#tokenizer = new Tokenizer(json, config);
    this.#special = json.added_tokens.filter((token) => token.special);
    this.specialIds = new Set(this.#special.map((token) => token.id));
  }

  // The ids of a prompt: what the tokenizer puts before a text, and special tokens where they are spelt.
  encode(text) {
    return this.#tokenizer.encode(text).ids;
  }

  // The ids of a text as it stands: nothing put before it, no special token read out of it.
  encodeLiteral(text) {
    return this.#literally(text).encode(text, { add_special_tokens: false }).ids;
  }

  id(token) {
    return this.#tokenizer.token_to_id(token);
  }

  decode(ids) {
    return ids.length === 0 ? "" : this.#tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  }

  // The tokenizer, or where a text spells a special token another of the same vocabulary that knows none.
  #literally(text) {
    if (!this.#special.some((token) => text.includes(token.content))) return this.#tokenizer;
    const added_tokens = this.#json.added_tokens.filter((token) => !token.special);
    this.#literal ??= new Tokenizer({ ...this.#json, added_tokens, post_processor: null }, this.#config);
    return this.#literal;
  }
}

// The text of tokens as they come, never half a character. The pieces make up what `decode` returns for all of them.
export class TextStream {
  #text;
  #before = []; // the tokens of the last piece: decoders join and strip at the beginning of a text
  #held = [];

  constructor(text) {
    this.#text = text;
  }

  // Takes a token and returns the whole characters that are complete with it, often none.
  push(token) {
    if (this.#text.specialIds.has(token)) return "";
    this.#held.push(token);
    const piece = this.#piece();
    if (piece.endsWith(REPLACEMENT)) return ""; // perhaps the beginning of a character
    this.#before = this.#held;
    this.#held = [];
    return piece;
  }

  // Returns the rest: the text ended within a character.
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
