// The text on the page: what the user wrote, answers, and calls of tools with their results.
import { dumps, parse } from "./json.js";

const log = () => document.getElementById("log");
// An answer that grows keeps the end of the text in view, if it was in view before.
const NEAR = 80;

// Adds a paragraph and returns the element of its text.
export function paragraph(kind, who, text = "") {
  const made = document.createElement("p");
  made.className = kind;
  if (who) made.append(span("who", who));
  const said = span("", text);
  made.append(said);
  log().append(made);
  log().scrollTop = log().scrollHeight;
  return said;
}

export function span(kind, text = "") {
  const made = document.createElement("span");
  if (kind) made.className = kind;
  made.textContent = text;
  return made;
}

export function follow(change) {
  const { scrollHeight, scrollTop, clientHeight } = log();
  change();
  if (scrollHeight - scrollTop - clientHeight < NEAR) log().scrollTop = log().scrollHeight;
}

// An answer while it is generated: its text, and a paragraph for each call.
export class Answer {
  #into;
  #text = "";
  #calls = [];

  // into: the element of the text.
  constructor(into) {
    this.#into = into;
    into.className = "new";
  }

  get text() {
    return this.#text;
  }

  // Shows the next part of the answer: {text} or {call: {index, name}} or {call: {index, arguments}}.
  told({ text, call }) {
    follow(() => {
      if (text) this.#into.textContent = this.#text += text;
      if (call?.name !== undefined) this.#calls.push(paragraph("call", "call", `${call.name} `));
      if (call?.arguments) this.#calls[call.index].textContent += call.arguments;
    });
  }

  // Shows the whole message, in which calls are complete. What looked like a call may be text.
  show({ content, tool_calls = [] }) {
    follow(() => {
      this.#into.textContent = content;
      this.#into.parentElement.hidden = !content && tool_calls.length > 0;
      for (const each of this.#calls) each.parentElement.remove();
      this.#calls = tool_calls.map((call) => paragraph("call", "call", callText(call)));
    });
  }

  // Removes the answer and what asked for it.
  remove(count) {
    for (const each of this.#calls) each.parentElement.remove();
    const own = this.#into.parentElement;
    for (let i = 0; i < count; i++) own.previousSibling.remove();
    own.remove();
  }
}

// Returns a call as text: set_light(room: "kitchen", on: true).
export function callText({ function: { name, arguments: given } }) {
  try {
    return `${name}(${[...parse(given)].map(([key, value]) => `${key}: ${dumps(value)}`).join(", ")})`;
  } catch {
    return `${name} ${given}`; // a server may send arguments that are not an object
  }
}
