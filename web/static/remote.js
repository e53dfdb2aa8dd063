// Generates answers with the server that the page comes from, over its OpenAI-compatible API.
import { dumps, strip } from "./json.js";
import { Problem } from "./problem.js";
import { declaration, declared } from "./tools.js";

const at = (path) => new URL(path, import.meta.url);

export class Remote {
  key = "";
  model = "";

  // The models of the server.
  async models() {
    const { data } = await (await this.#fetch("v1/models")).json();
    return data.map(({ id }) => id);
  }

  // Generates an answer; calls back with pieces: {text}, or {call}, a part of a call (see calls.js). Returns figures, and the
  // message if there are tools. ask: {prompt}, or {messages, tools: JSON text}; signal: an AbortSignal that stops it.
  async answer({ tools, ...ask }, options, { told, signal }) {
    const started = performance.now();
    const run = { promptTokens: null, tokens: null, ttftMs: null, tokensPerSecond: null, reason: "stopped" };
    const body = {
      model: this.model,
      stream: true,
      stream_options: { include_usage: true },
      ...ask,
      max_tokens: options.newTokens,
      temperature: options.temperature,
      top_k: options.topK,
      top_p: options.topP,
      min_p: options.minP,
      seed: options.seed,
    };
    const reply = new Reply();
    let first = null;
    let reason = null;
    try {
      const path = ask.messages ? "v1/chat/completions" : "v1/completions";
      const response = await this.#fetch(path, { method: "POST", body: withTools(body, tools), signal });
      for await (const event of events(response.body)) {
        if (event.error) throw new Problem(event.error.message, "try again");
        const choice = event.choices?.[0];
        for (const piece of reply.pieces(choice)) {
          first ??= performance.now();
          told(piece);
        }
        reason = choice?.finish_reason ?? reason;
        if (event.usage) [run.promptTokens, run.tokens] = [event.usage.prompt_tokens, event.usage.completion_tokens];
      }
    } catch (error) {
      if (signal.aborted) return tools ? { ...run, message: reply.message(false) } : run;
      throw error;
    }
    run.reason = { length: "length", stop: "end", tool_calls: "end" }[reason] ?? "stopped";
    if (tools) run.message = reply.message(reason === "tool_calls" || reason === "stop");
    if (first !== null) {
      run.ttftMs = first - started;
      if (run.tokens > 1) run.tokensPerSecond = (1e3 * (run.tokens - 1)) / (performance.now() - first);
    }
    return run;
  }

  async #fetch(path, options = {}) {
    const headers = { "content-type": "application/json", ...(this.key ? { authorization: `Bearer ${this.key}` } : {}) };
    let response;
    try {
      response = await fetch(at(path), { ...options, headers });
    } catch (error) {
      if (options.signal?.aborted) throw error;
      throw new Problem("the server does not answer", "is slm serve still running?");
    }
    if (response.ok) return response;
    const said = await response.json().catch(() => null);
    const message = said?.error?.message ?? `the server answered ${response.status}`;
    const after = response.headers.get("retry-after");
    const hints = { 401: "put the API key into the settings", 429: `try again in ${after ?? "some"} seconds` };
    throw new Problem(message, hints[response.status] ?? "");
  }
}

// Returns a body as JSON text. The tools keep the spelling of their numbers: 1.0 is not sent as 1.
function withTools(body, tools) {
  const text = JSON.stringify(body);
  return tools ? `${text.slice(0, -1)},"tools":${dumps(declared(tools).map(declaration))}}` : text;
}

// A streamed reply: its text and its calls.
class Reply {
  #text = "";
  #calls = [];

  // Takes a choice of an event. Returns its pieces for the page.
  pieces(choice) {
    const found = [];
    const text = choice?.delta?.content ?? choice?.text;
    if (text) {
      this.#text += text;
      found.push({ text });
    }
    for (const { index, id, function: part } of choice?.delta?.tool_calls ?? []) {
      if (part?.name) {
        this.#calls[index] = { id, type: "function", function: { name: part.name, arguments: "" } };
        found.push({ call: { index, name: part.name } });
      }
      if (part?.arguments) {
        this.#calls[index].function.arguments += part.arguments;
        found.push({ call: { index, arguments: part.arguments } });
      }
    }
    return found;
  }

  // Returns the message; without its calls if it is not complete, because the last one may be cut.
  message(complete) {
    const message = { role: "assistant", content: strip(this.#text) };
    return complete && this.#calls.length ? { ...message, tool_calls: this.#calls } : message;
  }
}

// Parses the JSON of server-sent events from a stream of bytes, which may split characters.
export async function* events(body) {
  const decoder = new TextDecoder();
  let held = "";
  for await (const bytes of chunks(body)) {
    held += decoder.decode(bytes, { stream: true });
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// Some browsers do not support `for await` on streams.
async function* chunks(body) {
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
