// Runs the model outside the page's thread. Messages in: {load: site, runtime}, {pause: true} while it loads,
// {ask, options, id}, {measure, id}, {stop: true}, {reset: true}.
import { backendOf, memoryBytes } from "./backend.js";
import { CallStream, replyMessage } from "./calls.js";
import { fromOpenai, startTurns } from "./chat.js";
import { generate } from "./generate.js";
import { measure, promptIds } from "./measure.js";
import { Problem, asProblem } from "./problem.js";
import { fetchAll, forget } from "./store.js";
import { Text } from "./text.js";
import { declared } from "./tools.js";
import { unpacked } from "./vocabulary.js";

let model = null;
let stopping = false;
const pausing = new AbortController();
// Between messages about the progress of loading, in milliseconds.
const TELLING_MS = 100;

self.onmessage = async ({ data }) => {
  try {
    if (data.stop) stopping = true;
    else if (data.pause) pausing.abort();
    else if (data.reset) model?.decoder.reset();
    else if (data.load) self.postMessage({ ready: await load(data.load, data.runtime) });
    else if (data.ask) self.postMessage({ id: data.id, done: await answer(data) });
    else if (data.measure) self.postMessage({ id: data.id, done: await measured(data) });
  } catch (error) {
    const { message, hint } = asProblem(error);
    self.postMessage({ id: data.id, problem: { message, hint } });
  }
};

// Loads the site's model; returns a description of the backend.
async function load(site, runtime) {
  const backend = await backendOf(site, runtime);
  const { contents, kept } = await fetchAll(backend.wanted, progress(), backend.place, { signal: pausing.signal });
  await forget(site.files);
  self.postMessage({ loading: { starting: true } });
  const json = (name) => JSON.parse(new TextDecoder().decode(contents[`model/${name}`]));
  const manifest = json("manifest.json");
  const tables = contents["model/tokenizer.bin"];
  const config = "model/tokenizer_config.json" in contents ? json("tokenizer_config.json") : {};
  const text = new Text(tables ? unpacked(tables) : { rules: json("tokenizer.json") }, config);
  model = { text, decoder: await backend.open(contents, manifest), site };
  model.stops = new Set(site.model.stop_token_ids);
  const { turns, ...chat } = await startTurns(text, site.model.turns, model.stops);
  model.turns = turns;
  return {
    ...chat,
    device: backend.device,
    reason: backend.reason,
    threads: backend.threads,
    isolated: self.crossOriginIsolated,
    precision: manifest.precision,
    context: manifest.context,
    kept,
    memory: memory(),
  };
}

// Returns a function that tells the page about the progress of loading, but not about every piece.
function progress() {
  let last = -Infinity;
  return (loading) => {
    const now = performance.now();
    if (!loading.waiting && loading.loaded < loading.total && now - last < TELLING_MS) return;
    last = now;
    self.postMessage({ loading });
  };
}

async function answer({ ask, options, id }) {
  if (model === null) throw new Problem("the model is not loaded", "load it first");
  stopping = false;
  const { text, decoder, stops, site } = model;
  const told = (piece) => self.postMessage({ id, ...piece });
  const control = { told, stopped: () => stopping };
  if (ask.prompt !== undefined) {
    return figures(await generate(decoder, text, text.encode(ask.prompt), options, { stops, ...control }));
  }
  if (!model.turns) throw new Problem("this model does not support chats", "let it continue text");
  const { turns } = site.model;
  const tools = ask.tools ? declared(ask.tools) : [];
  const messages = fromOpenai(ask.messages, tools);
  const declarations = turns.declares_tools ? tools : [];
  const { ids, forgotten } = model.turns.fitting(messages, decoder.context, options.newTokens, declarations);
  const reply = tools.length ? new Reply(tools, turns.style, told) : null;
  const run = await generate(decoder, text, ids, options, {
    stops: new Set(turns.ends),
    resume: true,
    ...control,
    ...(reply ? { told: reply.told, shown: new Set(turns.shown) } : {}),
  });
  return { ...figures(run), forgotten, ...(reply ? { message: reply.finish() } : {}) };
}

// Divides a reply into text and calls for the page.
class Reply {
  #tools;
  #style;
  #stream;
  #told;
  #whole = "";

  constructor(tools, style, told) {
    [this.#tools, this.#style, this.#told] = [tools, style, told];
    this.#stream = new CallStream(style, tools);
  }

  told = (piece) => {
    if (piece.text === undefined) return this.#told(piece);
    this.#whole += piece.text;
    return this.#tell(this.#stream.push(piece.text));
  };

  // Returns the message of the whole reply.
  finish() {
    this.#tell(this.#stream.finish());
    return replyMessage(this.#whole, this.#style, this.#tools);
  }

  #tell(parts) {
    for (const part of parts) this.#told(typeof part === "string" ? { text: part } : { call: part });
  }
}

async function measured({ measure: plan, id }) {
  stopping = false;
  const told = (round) => self.postMessage({ id, ...round });
  const ids = plan.ids ?? promptIds(model.text, plan.promptTokens);
  return { ...(await measure(model.decoder, ids, plan, { told, stopped: () => stopping })), memory: memory() };
}

function figures(run) {
  return { ...run, tokens: run.tokens.length, ids: run.tokens, memory: memory() };
}

// Returns the bytes of WebAssembly's memory, including weights and caches, and the bytes of the caches.
function memory() {
  return { runtime: memoryBytes(), caches: model?.decoder.cacheBytes ?? 0 };
}
