// The messages of a conversation in OpenAI's format, with the calls of tools that wait for results.
import { strip } from "./json.js";

export class Conversation {
  messages = [];

  // The calls of the last answer that have no results yet.
  get calls() {
    return this.messages.at(-1)?.tool_calls ?? [];
  }

  // Returns the conversation with a system message ("" for none) and a request.
  withRequest(system, content) {
    const first = strip(system) ? [{ role: "system", content: system }] : [];
    return [...first, ...this.messages.filter(({ role }) => role !== "system"), { role: "user", content }];
  }

  // Returns the conversation with the results of `calls`, in their order.
  withResults(results) {
    return [...this.messages, ...this.calls.map(({ id }, i) => ({ role: "tool", tool_call_id: id, content: results[i] }))];
  }

  // Records an answer to messages that `withRequest` or `withResults` returned. Returns whether it has text or calls: the request
  // of an answer without both is dropped, because turns alternate.
  record(asked, message) {
    this.messages = [...asked, message];
    const empty = !message.content && !message.tool_calls?.length;
    if (empty) this.drop();
    return !empty;
  }

  // Drops the last request and what followed it.
  drop() {
    const last = this.messages.findLastIndex(({ role }) => role === "user");
    this.messages = this.messages.slice(0, Math.max(last, 0));
  }
}
