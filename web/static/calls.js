// Divides a reply into text and calls while it is generated, as in slm.core.call_stream.
import { SPACE, dumps, parse, strip, stripEnd, stripStart } from "./json.js";
import { JSON_STYLE, ordered, parsedCalls } from "./tools.js";

const S = `${SPACE}*`;
const HEADER = new RegExp(
  `^${S}\\{${S}"name"${S}:${S}("(?:[^"\\\\]|\\\\[^\\n])*")${S},${S}"(?:arguments|parameters)"${S}:${S}(?=\\{)`,
);
const GEMMA_HEADER = new RegExp(`^${S}call:((?:(?!${SPACE})[^{}<>,:])+)(?=\\{)`);
const END = new RegExp(`^${S}\\}${S}`);
// A call whose name does not follow within so many characters is text.
const LONGEST_HEADER = 1024;

// Reads a reply piece by piece. Parts are texts, or parts of calls: {index, name} begins a call, {index, arguments} continues
// the JSON text of its arguments.
export class CallStream {
  #style;
  #tools;
  #buffer = "";
  #space = ""; // white space that is text only if text follows
  #said = false;
  #afterCall = false;
  #state = "text";
  #name = "";
  #depth = 0;
  #inString = false;
  #escaped = false;
  #begun = 0;

  // style: the format of calls; tools: the declared tools, whose order of arguments Gemma's formats get.
  constructor(style = JSON_STYLE, tools = []) {
    this.#style = style;
    this.#tools = tools;
  }

  // Takes the next piece of the reply. Returns the parts that are certain.
  push(text) {
    this.#buffer += text;
    const found = [];
    while (this.#read(found));
    return found;
  }

  // Returns the text that is still held back: the reply has ended.
  finish() {
    const found = [];
    if (this.#state === "header") [this.#buffer, this.#state] = [this.#style.opening + this.#buffer, "text"];
    if (this.#state === "text") {
      this.#say(this.#buffer, found);
      if (this.#space && !this.#afterCall) found.push(this.#space);
    }
    this.#buffer = this.#space = "";
    return found;
  }

  #read(found) {
    if (this.#state === "text") return this.#text(found);
    if (this.#state === "header") return this.#header(found);
    if (this.#state === "arguments") return this.#arguments(found);
    return this.#state === "closing" ? this.#closing() : this.#whole(found);
  }

  #text(found) {
    const { opening } = this.#style;
    const start = this.#buffer.indexOf(opening);
    if (start < 0) {
      const certain = this.#buffer.length - begun(this.#buffer, opening);
      const text = this.#buffer.slice(0, certain);
      this.#buffer = this.#buffer.slice(certain);
      this.#say(text, found);
      return false;
    }
    this.#say(this.#buffer.slice(0, start), found);
    this.#buffer = this.#buffer.slice(start + opening.length);
    this.#state = "header";
    return true;
  }

  // Adds a text, without the white space at its end, which may come before a call.
  #say(given, found) {
    let text = this.#space + given;
    if (this.#afterCall) text = stripStart(text);
    const said = stripEnd(text);
    this.#space = text.slice(said.length);
    if (!said) return;
    found.push(this.#afterCall && this.#said ? `\n${said}` : said);
    [this.#said, this.#afterCall] = [true, false];
  }

  #header(found) {
    const json = this.#style.quote === null;
    const header = (json ? HEADER : GEMMA_HEADER).exec(this.#buffer);
    const name = header && nameOf(header[1]);
    if (!name) {
      if (!header && Array.from(this.#buffer).length <= LONGEST_HEADER && !this.#buffer.includes(this.#style.closing)) return false;
      this.#say(this.#style.opening, found); // not a call: the opening is text, and what follows may have a call
      this.#state = "text";
      return true;
    }
    found.push({ index: this.#begun, name });
    [this.#name, this.#begun] = [name, this.#begun + 1];
    [this.#space, this.#afterCall] = ["", true];
    this.#buffer = this.#buffer.slice(header[0].length);
    this.#state = json ? "arguments" : "whole";
    return true;
  }

  #arguments(found) {
    const end = this.#endOfObject();
    const part = end === null ? this.#buffer : this.#buffer.slice(0, end);
    this.#buffer = this.#buffer.slice(part.length);
    if (part) found.push({ index: this.#begun - 1, arguments: part });
    if (end === null) return false;
    this.#state = "closing";
    return true;
  }

  // Returns where the object of arguments ends in the buffer; null if it does not.
  #endOfObject() {
    for (let place = 0; place < this.#buffer.length; place++) {
      const character = this.#buffer[place];
      if (this.#inString) {
        const ends = character === '"' && !this.#escaped;
        this.#escaped = character === "\\" && !this.#escaped;
        this.#inString = !ends;
      } else if (character === '"') this.#inString = true;
      else if (character === "{" || character === "[") this.#depth += 1;
      else if ((character === "}" || character === "]") && --this.#depth === 0) return place + 1;
    }
    return null;
  }

  #closing() {
    const end = END.exec(this.#buffer)?.[0].length;
    if (end === undefined || !this.#buffer.startsWith(this.#style.closing, end)) return false;
    this.#ended(end + this.#style.closing.length);
    return true;
  }

  // Reads the arguments of a call in Gemma's formats, which become JSON at its end.
  #whole(found) {
    const { opening, closing } = this.#style;
    for (let end = -1; (end = this.#buffer.indexOf(closing, end + 1)) >= 0; ) {
      const length = end + closing.length;
      const { calls } = parsedCalls(`${opening}call:${this.#name}${this.#buffer.slice(0, length)}`, this.#style);
      if (!calls.length) continue; // a closing within a string does not end the call
      const call = ordered(calls[0], this.#tools.find(({ name }) => name === this.#name));
      found.push({ index: this.#begun - 1, arguments: dumps(call.arguments) });
      this.#ended(length);
      return true;
    }
    return false;
  }

  #ended(length) {
    this.#buffer = this.#buffer.slice(length);
    this.#state = "text";
  }
}

// Returns the message of a whole reply in OpenAI's format. Calls of tools that are not declared stay text.
export function replyMessage(reply, style, tools) {
  const answer = strip(reply);
  const { text, calls } = parsedCalls(answer, style);
  const known = new Map(tools.map((tool) => [tool.name, tool]));
  if (!calls.length || calls.some(({ name }) => !known.has(name))) return { role: "assistant", content: answer };
  const tool_calls = calls.map((call, i) => {
    const given = dumps(ordered(call, known.get(call.name)).arguments);
    return { id: `call_${i}`, type: "function", function: { name: call.name, arguments: given } };
  });
  return { role: "assistant", content: text, tool_calls };
}

// Returns how many characters at the end of a text may begin an opening.
function begun(text, opening) {
  for (let length = Math.min(text.length, opening.length - 1); length > 0; length--) {
    if (opening.startsWith(text.slice(-length))) return length;
  }
  return 0;
}

function nameOf(spelled) {
  if (!spelled.startsWith('"')) return spelled;
  try {
    return parse(spelled);
  } catch {
    return null;
  }
}
