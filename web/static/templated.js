// Token ids of conversations that a model's own chat template renders, as in slm.core.templated: texts of messages form no
// control token. A conversation is rendered as it is, and with a placeholder for every visible character of the messages; the
// control tokens of the second text are the template's own. Texts are lists of characters (code points), because a placeholder
// has two UTF-16 units.
import { isSpace } from "./json.js";
import { compiled } from "./jinja.js";
import { Problem } from "./problem.js";

const FIRST = 0xf0000;
const LAST = 0x10fffd;
const isPlaceholder = (character) => character.codePointAt(0) >= FIRST && character.codePointAt(0) <= LAST;
// A token of the vocabulary that looks like a marker but is not an added token.
const MARKER = /^[<[{|].*[\p{L}\p{N}_].*[>\]}|]$/su;
const LONGEST_MARKER = 128;
// Words of calls and JSON schemas that templates look up or compare; they contain no control token.
const KEYWORDS = new Set([
  ...["id", "type", "function", "name", "arguments", "response", "value", "description", "parameters"],
  ...["properties", "required", "items", "additionalProperties", "$ref", "$defs", "title", "format", "nullable"],
  ...["enum", "const", "anyOf", "oneOf", "allOf", "default", "minimum", "maximum"],
  ...["string", "number", "integer", "boolean", "object", "array", "null"],
]);
// JSON escapes these, so that a placeholder for them would shift the text after it.
const ESCAPED = new Map([['"', '"'], ["\\", "\\"]]);

export class Templated {
  #text;
  #render;
  #tokens;
  #parts;

  // text: the tokenizer; template: the template; tokens: special tokens by the names that templates use;
  // parts: whether contents of messages are lists of parts.
  constructor(text, { template, tokens, parts }) {
    this.#text = text;
    this.#render = compiled(template);
    this.#tokens = tokens;
    this.#parts = parts;
  }

  // Returns the ids of the prompt for the next answer. messages: Maps, as the template reads them; tools: declarations, or null.
  ids(messages, tools, stops, now) {
    const texts = [...new Set([...messages.flatMap(textsOf), ...strings(tools)])];
    const table = placeholders(texts);
    const text = this.#rendered(messages, tools, now);
    const hidden = this.#hidden(messages, tools, table, now);
    let marked = null;
    if (!aligned(text, hidden)) {
      const punctuation = new Map([...table].filter(([character]) => !/[\p{L}\p{N}]/u.test(character)));
      marked = this.#hidden(messages, tools, punctuation, now);
    }
    const back = new Map([...table].map(([character, placeholder]) => [placeholder, character]));
    return encoded(this.#text, { text, hidden, marked, back, texts }, stops);
  }

  #rendered(messages, tools, now) {
    const shaped = this.#parts ? messages.map(inParts) : messages;
    const variables = { documents: null, ...this.#tokens, messages: shaped, tools, add_generation_prompt: true };
    return Array.from(this.#render(variables, now));
  }

  // Returns the text with placeholders; null if the template rejects it.
  #hidden(messages, tools, table, now) {
    try {
      return this.#rendered(messages.map((message) => replacedMessage(message, table)), replaced(tools, within(table)), now);
    } catch (error) {
      if (error instanceof Problem) return null;
      throw error;
    }
  }
}

const within = (table) => new Map([...table, ...ESCAPED]);
const inParts = (message) => new Map([...message, ["content", [new Map([["type", "text"], ["text", message.get("content")]])]]]);

function textsOf(message) {
  return [...message].flatMap(([name, value]) => {
    if (name === "content" && typeof value === "string") return [value];
    return name === "role" ? [] : strings(value);
  });
}

function strings(value) {
  if (typeof value === "string") return KEYWORDS.has(value) ? [] : [value];
  if (value instanceof Map) return [...value].flatMap(([name, each]) => [...strings(name), ...strings(each)]);
  return Array.isArray(value) ? value.flatMap(strings) : [];
}

// Returns a placeholder for each visible character; equal texts stay equal.
function placeholders(texts) {
  const characters = new Set(texts.flatMap((text) => Array.from(text)));
  const visible = [...characters].filter((each) => !isSpace(each)).sort((a, b) => a.codePointAt(0) - b.codePointAt(0));
  return new Map(visible.map((each, i) => [each, String.fromCodePoint(FIRST + (i % (LAST - FIRST)))]));
}

const translated = (text, table) => Array.from(text, (each) => table.get(each) ?? each).join("");

function replacedMessage(message, table) {
  const entries = [...message].map(([name, value]) => {
    if (name === "content" && typeof value === "string") return [name, translated(value, table)];
    return [name, name === "role" ? value : replaced(value, within(table))];
  });
  return new Map(entries);
}

function replaced(value, table) {
  if (typeof value === "string") return KEYWORDS.has(value) ? value : translated(value, table);
  if (value instanceof Map) return new Map([...value].map(([name, each]) => [replaced(name, table), replaced(each, table)]));
  return Array.isArray(value) ? value.map((each) => replaced(each, table)) : value;
}

// Returns whether a rendering equals the text except for placeholders.
function aligned(text, view) {
  return view !== null && view.length === text.length && view.every((each, i) => isPlaceholder(each) || each === text[i]);
}

function encoded(tokenizer, { text, hidden, marked, back, texts }, stops) {
  const controls = new Controls(tokenizer, hidden ?? marked ?? [], stops);
  for (const view of [hidden, marked]) if (aligned(text, view)) return controls.encode(text, controls.placed(view));
  // The template transforms the messages, so that the renderings differ.
  const orders = [hidden, marked].filter((view) => view !== null).map((view) => controls.placed(view).map(([token]) => token));
  const { ids, found } = controls.read(text);
  const order = found.map(([token]) => token);
  const harmless = !texts.some((each) => controls.read(Array.from(each)).found.length);
  if (harmless && orders.some((each) => same(each, order))) return ids;
  if (marked !== null && same(orders[0], orders.at(-1))) {
    return controls.encode(marked.map((each) => back.get(each) ?? each), controls.placed(marked));
  }
  throw new Problem(
    "the messages contain the text of a control token, and the model's chat template transforms them",
    "remove text such as <end_of_turn> from the messages",
  );
}

const same = (a, b) => a.length === b.length && a.every((each, i) => String(each) === String(b[i]));

// The control tokens of a conversation: the tokenizer's, the stop tokens, and the template's own markers.
class Controls {
  #text;
  #ids;

  constructor(text, view, stops) {
    this.#text = text;
    this.#ids = new Set([...text.controls, ...text.lengthy([...stops].filter((id) => !text.controls.has(id)))]);
    for (const id of new Set(text.encodeRendered(shortened(view).text))) {
      const spelled = text.spelled(id).trim();
      const length = Array.from(spelled).length;
      if (this.#ids.has(id) || length <= 1 || length > LONGEST_MARKER || Array.from(spelled).some(isPlaceholder)) continue;
      if (text.added.has(id) || MARKER.test(spelled)) this.#ids.add(id);
    }
  }

  // Returns the ids of a text, and the control tokens among them: [id, start, end].
  read(characters) {
    const text = characters.join("");
    const ids = this.#text.encodeRendered(text);
    return { ids, found: ids.some((id) => this.#ids.has(id)) ? this.#text.places(text, this.#ids) : [] };
  }

  // Returns the control tokens that the template itself writes.
  placed(view) {
    const { text, places } = shortened(view);
    const found = this.#text.places(text, this.#ids).map(([id, start, end]) => [id, places[start], end > start ? places[end - 1] + 1 : places[end]]);
    return found.filter(([, start, end]) => !view.slice(start, end).some(isPlaceholder));
  }

  // Returns the ids of a text with known control tokens.
  encode(characters, placed) {
    const { ids, found } = this.read(characters);
    if (same(found, placed)) return ids;
    const besides = new Set([...this.#ids].filter((id) => !this.#text.controls.has(id)));
    const made = [];
    let at = 0;
    for (const [token, start, end] of placed) {
      made.push(...this.#text.encodeLiteral(characters.slice(at, start).join(""), besides), token);
      at = end;
    }
    return [...made, ...this.#text.encodeLiteral(characters.slice(at).join(""), besides)];
  }
}

// Returns a rendering in which each run of placeholders is one character, and the position of each character in the rendering.
function shortened(view) {
  const [kept, places] = [[], []];
  for (let at = 0; at < view.length; ) {
    let end = at + 1;
    if (isPlaceholder(view[at])) {
      for (let next = end; next < view.length && (isPlaceholder(view[next]) || isSpace(view[next])); next++) {
        if (isPlaceholder(view[next])) end = next + 1;
      }
    }
    kept.push(view[at]);
    places.push(at);
    at = end;
  }
  return { text: kept.join(""), places: [...places, view.length] };
}
