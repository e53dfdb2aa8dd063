// The fields for the results of calls. The user enters each result; the page executes nothing.
import { callText } from "./log.js";

export class Results {
  #root;
  #fields = [];

  // root: the element of the fields.
  constructor(root) {
    this.#root = root;
  }

  // Shows a field for each call.
  ask(calls) {
    this.clear();
    for (const [i, call] of calls.entries()) {
      const label = document.createElement("label");
      label.htmlFor = `result-${i}`;
      label.textContent = `Result of ${callText(call)}`;
      const field = document.createElement("textarea");
      field.id = label.htmlFor;
      field.rows = 2;
      field.spellcheck = false;
      this.#root.append(label, field);
      this.#fields.push(field);
    }
  }

  get values() {
    return this.#fields.map(({ value }) => value);
  }

  focus() {
    this.#fields[0]?.focus({ preventScroll: true });
  }

  clear() {
    this.#root.replaceChildren();
    this.#fields = [];
  }
}
