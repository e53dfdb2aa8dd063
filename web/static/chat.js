// Converts conversations to tokens, as in slm.core.chat: Gemma's turns, or the turns of the model's own chat template.
// "<end_of_turn>" in a message is encoded as plain characters.
import { JsonError, fromObject, parse, strip } from "./json.js";
import { Problem, asProblem } from "./problem.js";
import { declaration, declared, inTwoRoles, ordered, withTools } from "./tools.js";

const START = "<start_of_turn>";
const END = "<end_of_turn>";
// A prompt leaves room for the new tokens, but for no more than 1 / LEAST_ROOM of the context.
const LEAST_ROOM = 4;

// Prepares the turns of a model. fields: turns of site.json, or null. Returns {turns, noChat, noTools}: null if there are none,
// and why the page offers no chat and no tools ("" if it does). It offers them only if its prompts have the tokens of slm chat.
export async function startTurns(text, fields, stops) {
  if (!fields) return { turns: null, noChat: "this model has no turns", noTools: "" };
  const turns = new Turns(text, stops, fields.form);
  try {
    if (fields.template !== null) await turns.useTemplate(fields);
    checkPrompts(turns, fields.prompts, [], fields.time);
  } catch (error) {
    return { turns: null, noChat: asProblem(error).message, noTools: "" };
  }
  try {
    if (fields.prompts_with_tools === null) throw new Problem("the model's chat template rejects tools");
    checkPrompts(turns, fields.prompts_with_tools, declared(fields.tools), fields.time);
    return { turns, noChat: "", noTools: "" };
  } catch (error) {
    return { turns, noChat: "", noTools: asProblem(error).message };
  }
}

function checkPrompts(turns, prompts, tools, time) {
  for (const { messages, ids } of prompts) {
    const found = turns.ids(fromOpenai(messages, tools), tools, new Date(time));
    if (found.length !== ids.length || found.some((id, i) => id !== ids[i])) {
      throw new Problem("the page renders the model's chat template differently from slm chat");
    }
  }
}

// The turns of a model.
export class Turns {
  #text;
  #stops;
  #form;
  #template = null;

  // text: the tokenizer; stops: ids of the model's stop tokens, which messages must not form; form: how the model's own
  // template writes tools, {native, objects, system}.
  constructor(text, stops = [], form = {}) {
    this.#text = text;
    this.#stops = stops;
    this.#form = form;
  }

  // Uses the model's own template: {template, tokens, parts}.
  async useTemplate(fields) {
    const { Templated } = await import("./templated.js"); // most models need neither this nor the library behind it
    this.#template = new Templated(this.#text, fields);
    return this;
  }

  // Returns the ids of the prompt for the next answer. messages: [{role, content, calls: [{name, arguments: Map}]}], of the
  // roles "system", "user", "assistant" and "tool"; tools: as `declared` returns them; now: the time that the template sees.
  ids(messages, tools = [], now = new Date()) {
    if (this.#template === null) return this.#own(withTools(messages, tools));
    const [asked, declarations] = this.#forTemplate(messages, tools);
    return this.#template.ids(asked, declarations, this.#stops, now);
  }

  // Returns the prompt for as much of a conversation as leaves room for an answer; the oldest exchanges are dropped.
  fitting(messages, context, newTokens, tools = []) {
    const room = Math.min(newTokens, Math.floor(context / LEAST_ROOM));
    const first = messages[0]?.role === "system" ? 1 : 0;
    let kept = messages;
    let forgotten = 0;
    for (;;) {
      const ids = this.ids(kept, tools);
      const second = kept.findIndex(({ role }, i) => i > first && role === "user");
      if (ids.length + room <= context || second < 0) return { ids, forgotten };
      kept = [...kept.slice(0, first), ...kept.slice(second)];
      forgotten += 1;
    }
  }

  #own(messages) {
    const text = this.#text;
    const besides = text.lengthy([...this.#stops].filter((id) => !text.controls.has(id)));
    const [start, end] = [text.id(START), text.id(END)];
    if (start === undefined || end === undefined) throw new Problem("the model has no turns", "let it continue text");
    const ids = [...text.encode("")];
    const line = text.encodeLiteral("\n");
    const model = text.encodeLiteral("model\n");
    for (const { role, content } of messages) {
      const said = strip(content);
      if (role === "assistant") ids.push(start, ...model, ...text.encodeLiteral(said, besides), end, ...line);
      else ids.push(start, ...text.encodeLiteral(`${role}\n${said}`, besides), end, ...line);
    }
    return [...ids, start, ...model];
  }

  // Returns the messages and the declarations that the model's template renders.
  #forTemplate(messages, tools) {
    if (!tools.length && !messages.some(({ role, calls }) => role === "tool" || calls?.length)) {
      return [messages.map(({ role, content }) => fromObject({ role, content })), null];
    }
    if (!this.#form.native) return [inTwoRoles(withTools(messages, tools), this.#form.system).map(fromObject), null];
    const found = [];
    const names = [];
    let [number, answered] = [0, 0]; // of the next call, and of the call that the next result answers
    for (const { role, content, calls = [], name } of messages) {
      const rendered = new Map([["role", role], ["content", content]]);
      if (calls.length) {
        rendered.set("tool_calls", calls.map((call, i) => openai(call, number + i)));
        [answered, number] = [number, number + calls.length];
        names.push(...calls.map((call) => call.name));
      }
      if (role === "tool") {
        const fields = this.#form.objects ? objectOf(content) : null;
        rendered.set("content", fields ?? content);
        rendered.set("name", name || (names[answered] ?? "tool")).set("tool_call_id", idOf(answered));
        answered += 1;
      }
      found.push(rendered);
    }
    return [found, tools.length ? tools.map(declaration) : null];
  }
}

// Returns messages in OpenAI's format, whose arguments are JSON text, as `Turns` takes them. Arguments are ordered as declared.
export function fromOpenai(messages, tools) {
  const names = new Map();
  return messages.map(({ role, content, tool_calls = [], tool_call_id }) => {
    for (const { id, function: { name } } of tool_calls) names.set(id, name);
    const calls = tool_calls.map(({ function: call }) => {
      const tool = tools.find(({ name }) => name === call.name);
      return ordered({ name: call.name, arguments: parse(call.arguments) }, tool);
    });
    return { role, content: content ?? "", ...(calls.length ? { calls } : {}), ...(role === "tool" ? { name: names.get(tool_call_id) } : {}) };
  });
}

function openai({ name, arguments: given }, number) {
  const call = new Map([["name", name], ["arguments", given]]);
  return new Map([["id", idOf(number)], ["type", "function"], ["function", call]]);
}

const idOf = (number) => `call${String(number).padStart(5, "0")}`;

// Returns the JSON object that a result spells; null for any other text.
function objectOf(text) {
  try {
    const found = parse(text, { constants: true });
    return found instanceof Map && found.size ? found : null;
  } catch (error) {
    if (error instanceof JsonError || error instanceof RangeError) return null;
    throw error;
  }
}
