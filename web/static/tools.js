// Tools: their declarations, the calls of a reply, and their texts in prompts, as in slm.core.tools and slm.core.tool_text.
import { JsonError, SPACE, depth, dumps, isValid, parse, parseAt, strip } from "./json.js";
import { Problem } from "./problem.js";

const MOST_TOOLS = 128;
const LONGEST_NAME = 64;
const LONGEST_PARAMETERS = 1 << 16;
export const DEEPEST = 64;
const NAME = /^[A-Za-z0-9_.-]+$/;
const FORM = 'tools are [{"type": "function", "function": {"name": ..., "description": ..., "parameters": {a JSON schema}}}]';
const HEAD = 'To call a tool, write <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>\nTools:';
const BARE_NAME = new RegExp(`(?:(?!${SPACE})[^{}<>,:])+`, "y");
const BARE_KEY = /[^{}[\],:<>]+/y;
const NUMBER = /-?(?:0|[1-9][0-9]{0,400})(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?/y;
const SPACES = new RegExp(`${SPACE}*`, "y");
// The format of calls of slm's own turns, and of Qwen and Hermes.
export const JSON_STYLE = { opening: "<tool_call>", closing: "</tool_call>", quote: null, between: "\n" };

const isMap = (value) => value instanceof Map;
const isText = (value) => typeof value === "string";
const isTexts = (value) => Array.isArray(value) && value.every(isText);
const isSchema = (value) => isMap(value) || typeof value === "boolean";
// The keywords of schemas that prompts depend on: the form of their values in words, and its check.
const KEYWORDS = {
  properties: ["an object of schemas", (value) => isMap(value) && [...value.values()].every(isSchema)],
  required: ["a list of names", isTexts],
  type: ["the name of a type, or a list of them", (value) => isText(value) || isTexts(value)],
  enum: ["a list of values", Array.isArray],
  anyOf: ["a list of schemas", Array.isArray],
  oneOf: ["a list of schemas", Array.isArray],
  $ref: ["text", isText],
  description: ["text", isText],
};

// Returns the tools of OpenAI's list of declarations as JSON text: [{name, description, parameters: Map}].
export function declared(text) {
  let value;
  try {
    value = parse(strip(text));
  } catch (error) {
    if (error instanceof JsonError) throw new Problem("the tools are not valid JSON", FORM);
    throw error;
  }
  if (isMap(value)) value = value.get("tools") ?? [value];
  if (!Array.isArray(value)) throw new Problem("the tools are not a list of declarations", FORM);
  if (value.length > MOST_TOOLS) throw new Problem(`there are ${value.length} tools; the limit is ${MOST_TOOLS}`);
  const tools = value.map((each, i) => readTool(each, `tool ${i + 1}`));
  const twice = tools.find(({ name }, i) => tools.findIndex((tool) => tool.name === name) < i);
  if (twice) throw new Problem(`two tools have the name ${twice.name}`, "give each tool its own name");
  return tools;
}

// Returns a declaration in OpenAI's format.
export function declaration({ name, description, parameters }) {
  const fields = new Map([["name", name], ["description", description], ["parameters", parameters]]);
  return new Map([["type", "function"], ["function", fields]]);
}

function readTool(value, where) {
  const call = isMap(value) ? (value.has("function") ? value.get("function") : value) : null;
  if (!isMap(call)) throw new Problem(`${where} is not an object`, FORM);
  const kind = value.get("type") ?? "function";
  if (kind !== "function") throw new Problem(`${where} has another type than "function"`, FORM);
  const name = call.get("name");
  if (!isText(name) || !name) throw new Problem(`${where} has no name`, FORM);
  if (name.length > LONGEST_NAME || !NAME.test(name)) {
    throw new Problem(`${where} has an invalid name`, `names have up to ${LONGEST_NAME} letters, digits, "_", "-" and "."`);
  }
  const description = call.get("description") ?? "";
  if (!isText(description)) throw new Problem(`${where}: the description is not text`, FORM);
  return { name, description, parameters: readParameters(call.get("parameters"), where) };
}

function readParameters(value, where) {
  let given = value;
  if (isText(given)) {
    try {
      given = parse(strip(given));
    } catch {
      throw new Problem(`${where}: parameters is text that is not valid JSON`, FORM);
    }
  }
  if (given === null || given === undefined || (isMap(given) && !given.size)) {
    return new Map([["type", "object"], ["properties", new Map()]]);
  }
  if (!isMap(given)) throw new Problem(`${where}: parameters is not an object`, "it is the JSON schema of the arguments");
  if (depth(given) > DEEPEST) throw new Problem(`${where}: parameters is nested more than ${DEEPEST} levels deep`);
  if (!isValid(given)) throw new Problem(`${where}: parameters is not valid JSON`);
  if (dumps(given).length > LONGEST_PARAMETERS) {
    throw new Problem(`${where}: parameters is longer than ${LONGEST_PARAMETERS.toLocaleString()} characters`);
  }
  const found = withoutNull(given);
  if (!found.has("type")) found.set("type", "object");
  if (found.get("type") !== "object") throw new Problem(`${where}: the type of parameters is not "object"`, FORM);
  if (!found.has("properties")) found.set("properties", new Map());
  checkSchemas(found, where);
  const missing = (found.get("required") ?? []).find((name) => !found.get("properties").has(name));
  if (missing !== undefined) throw new Problem(`${where}: the required parameter ${missing} is not in properties`, FORM);
  return found;
}

function checkSchemas(root, where) {
  const left = [root];
  const checked = new Set();
  while (left.length) {
    const schema = left.pop();
    if (!isMap(schema) || checked.has(schema)) continue;
    checked.add(schema);
    for (const [key, [form, fits]] of Object.entries(KEYWORDS)) {
      // `required: true` in the schema of a single field is that of an early draft of JSON schemas.
      if (schema.has(key) && !fits(schema.get(key)) && !(key === "required" && !schema.has("properties"))) {
        throw new Problem(`${where}: ${key} is not ${form}`, FORM);
      }
    }
    left.push(...(schema.get("properties")?.values() ?? []), schema.get("items"), schema.get("additionalProperties"));
    left.push(referred(schema.get("$ref"), root), ...(schema.get("anyOf") ?? []), ...(schema.get("oneOf") ?? []));
  }
}

function withoutNull(value) {
  if (Array.isArray(value)) return value.map(withoutNull);
  if (!isMap(value)) return value;
  return new Map([...value].filter(([, each]) => each !== null).map(([key, each]) => [key, withoutNull(each)]));
}

// Returns a call with its arguments in the order of the declaration; a null that the declaration does not allow is dropped.
export function ordered(call, tool) {
  if (!tool) return call;
  return { ...call, arguments: orderedValue(call.arguments, tool.parameters, tool.parameters) };
}

function orderedValue(value, given, root) {
  const schema = describing(given, root);
  if (Array.isArray(value)) return value.map((each) => orderedValue(each, schema.get("items"), root));
  const properties = schema.get("properties");
  if (!isMap(value) || !isMap(properties)) return value;
  const names = [...[...properties.keys()].filter((name) => value.has(name)), ...[...value.keys()].filter((name) => !properties.has(name))];
  const required = schema.get("required") ?? [];
  const rest = schema.has("additionalProperties") ? schema.get("additionalProperties") : false;
  const kept = names.filter((name) => {
    if (value.get(name) !== null || (Array.isArray(required) && required.includes(name))) return true;
    return allowsNull(properties.has(name) ? properties.get(name) : rest);
  });
  return new Map(kept.map((name) => [name, orderedValue(value.get(name), properties.get(name), root)]));
}

// Returns the schema that describes a value: the target of a reference, or the only choice with fields or items.
function describing(given, root) {
  let schema = given;
  for (let step = 0; step < DEEPEST; step++) {
    if (!isMap(schema)) return new Map();
    const choices = schema.has("anyOf") ? schema.get("anyOf") : schema.get("oneOf");
    if (schema.has("$ref")) schema = referred(schema.get("$ref"), root);
    else if (Array.isArray(choices)) {
      const described = choices.filter((each) => isMap(each) && ["properties", "items", "$ref"].some((key) => each.has(key)));
      schema = described.length === 1 ? described[0] : null;
    } else return schema;
  }
  return new Map();
}

function referred(reference, root) {
  if (!isText(reference) || !reference.startsWith("#/")) return null;
  let found = root;
  for (const part of reference.slice(2).split("/")) {
    found = isMap(found) ? found.get(part.replaceAll("~1", "/").replaceAll("~0", "~")) : null;
  }
  return found ?? null;
}

function allowsNull(schema) {
  if (!isMap(schema)) return schema !== false;
  if (schema.has("const")) return schema.get("const") === null;
  if (schema.has("enum")) return schema.get("enum").includes(null);
  if (schema.get("nullable") === true) return true;
  const kinds = schema.get("type");
  if (isText(kinds) || Array.isArray(kinds)) return [kinds].flat().includes("null");
  const choices = schema.has("anyOf") ? schema.get("anyOf") : schema.get("oneOf");
  return Array.isArray(choices) ? choices.some(allowsNull) : true;
}

// Returns the text of a reply without its calls, and the calls: {text, calls: [{name, arguments: Map}]}.
export function parsedCalls(text, style = JSON_STYLE) {
  const [parts, calls] = [[], []];
  let [at, begin] = [0, 0];
  for (let start; (start = text.indexOf(style.opening, begin)) >= 0; ) {
    const found = readCall(text, start + style.opening.length, style);
    if (found === null) {
      begin = start + style.opening.length;
      continue;
    }
    calls.push(found.call);
    parts.push(text.slice(at, start));
    at = begin = found.end;
  }
  parts.push(text.slice(at));
  if (!calls.length) return { text, calls };
  return { text: parts.map(strip).filter(Boolean).join("\n"), calls };
}

function readCall(text, at, style) {
  try {
    const [call, end] = style.quote === null ? jsonCall(text, at) : new Gemma(text, at, style.quote).call();
    if (depth(call.arguments) > DEEPEST || !isValid(call.arguments)) return null;
    const close = pastSpace(text, end);
    return text.startsWith(style.closing, close) ? { call, end: close + style.closing.length } : null;
  } catch (error) {
    if (error instanceof JsonError || error instanceof RangeError) return null;
    throw error;
  }
}

function jsonCall(text, at) {
  const [found, end] = parseAt(text, pastSpace(text, at));
  const key = isMap(found) && found.size === 2 && found.has("name") && ["arguments", "parameters"].find((each) => found.has(each));
  if (!key) throw new JsonError("not a call");
  const [name, given] = [found.get("name"), found.get(key)];
  if (!isText(name) || !name || !isMap(given)) throw new JsonError("not a call");
  return [{ name, arguments: given }, end];
}

function pastSpace(text, at) {
  SPACES.lastIndex = at;
  SPACES.exec(text);
  return SPACES.lastIndex;
}

// Reads `call:NAME{KEY:VALUE,...}`, where strings stand between quote marks.
class Gemma {
  #text;
  #at;
  #quote;

  constructor(text, at, quote) {
    [this.#text, this.#at, this.#quote] = [text, at, quote];
  }

  call() {
    this.#skip("call:");
    const name = this.#matched(BARE_NAME);
    return [{ name, arguments: this.#object(1) }, this.#at];
  }

  #object(level) {
    this.#skip("{");
    const found = new Map();
    while (!this.#follows("}")) {
      if (found.size) this.#skip(",");
      const key = this.#text.startsWith(this.#quote, this.#at) ? this.#string() : this.#matched(BARE_KEY);
      this.#skip(":");
      if (found.has(key)) throw new JsonError("a key comes twice");
      found.set(key, this.#value(level));
    }
    return found;
  }

  #array(level) {
    this.#skip("[");
    const found = [];
    while (!this.#follows("]")) {
      if (found.length) this.#skip(",");
      found.push(this.#value(level));
    }
    return found;
  }

  #value(level) {
    if (level > DEEPEST) throw new JsonError("nested too deeply");
    if (this.#text.startsWith(this.#quote, this.#at)) return this.#string();
    if (this.#text[this.#at] === "{") return this.#object(level + 1);
    if (this.#text[this.#at] === "[") return this.#array(level + 1);
    for (const [word, value] of [["true", true], ["false", false], ["null", null], ["None", null]]) {
      if (this.#follows(word)) return value;
    }
    return parse(this.#matched(NUMBER));
  }

  #string() {
    this.#skip(this.#quote);
    const end = this.#text.indexOf(this.#quote, this.#at);
    if (end < 0) throw new JsonError("a text does not end");
    const found = this.#text.slice(this.#at, end);
    this.#at = end + this.#quote.length;
    return found;
  }

  #matched(pattern) {
    pattern.lastIndex = this.#at;
    const found = pattern.exec(this.#text);
    if (found === null) throw new JsonError("not a call");
    this.#at = pattern.lastIndex;
    return found[0];
  }

  #follows(text) {
    const follows = this.#text.startsWith(text, this.#at);
    if (follows) this.#at += text.length;
    return follows;
  }

  #skip(text) {
    if (!this.#follows(text)) throw new JsonError("not a call");
  }
}

// Returns a reply of a text and calls as slm's own turns spell it.
export function withCalls(text, calls) {
  const written = calls.map(({ name, arguments: given }) => {
    return `${JSON_STYLE.opening}\n{"name": ${dumps(name)}, "arguments": ${dumps(given)}}\n${JSON_STYLE.closing}`;
  });
  return [strip(text), written.join(JSON_STYLE.between)].filter(Boolean).join("\n");
}

// Returns a conversation in which the system message declares the tools, and replies spell their calls as text.
export function withTools(messages, tools) {
  const found = messages.map(({ role, content, calls = [] }) => ({ role, content: calls.length ? withCalls(content, calls) : content }));
  if (!tools.length) return found;
  const system = found[0]?.role === "system" ? strip(found.shift().content) : "";
  const list = [HEAD, ...tools.map(line)].join("\n");
  return [{ role: "system", content: system ? `${system}\n\n${list}` : list }, ...found];
}

// Returns a conversation without the role "tool", in which user and assistant take turns.
// system: whether to keep the system message; otherwise it begins the first message of the user.
export function inTwoRoles(messages, system) {
  const found = [];
  for (const message of messages) {
    let { role, content } = message;
    if (role === "tool") [role, content] = ["user", `<tool_response>\n${strip(content)}\n</tool_response>`];
    else if (role === "system" && !system) role = "user";
    const last = found.at(-1);
    if (last?.role === role && role !== "assistant") {
      const between = message.role === "tool" ? "\n" : "\n\n";
      found[found.length - 1] = { role, content: `${strip(last.content)}${between}${strip(content)}` };
    } else found.push({ role, content });
  }
  return found;
}

function line({ name, description, parameters }) {
  const about = strip(description);
  return `${name}${signature(parameters)}${about ? ": " : ""}${about}`;
}

// Returns a JSON schema in short: {room: "kitchen" | "hall", level?: integer 0..100 (in percent)}.
export function signature(schema) {
  if (!isMap(schema)) return "any";
  if (schema.has("enum")) return schema.get("enum").map((each) => dumps(each)).join(" | ");
  if (schema.has("const")) return dumps(schema.get("const"));
  const choices = schema.get("anyOf") ?? schema.get("oneOf");
  if (choices) return choices.map(signature).join(" | ");
  const kind = schema.get("type") ?? "any";
  if (!isText(kind)) return kind.map(String).join(" | ");
  if (kind === "array" && schema.has("items")) return `[${signature(schema.get("items"))}, ...]`;
  if (kind === "object" && schema.has("properties")) {
    return `{${[...schema.get("properties")].map(([name, inner]) => field(schema, name, inner)).join(", ")}}`;
  }
  if (schema.has("minimum") || schema.has("maximum")) {
    const [least, most] = ["minimum", "maximum"].map((name) => (schema.has(name) ? dumps(schema.get(name)) : ""));
    return `${kind} ${least}..${most}`;
  }
  return kind;
}

function field(schema, name, inner) {
  const about = isMap(inner) ? inner.get("description") : null;
  const required = schema.get("required");
  const mark = Array.isArray(required) && required.includes(name) ? "" : "?";
  return `${name}${mark}: ${signature(inner)}${about ? ` (${strip(about)})` : ""}`;
}

