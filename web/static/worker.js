// Runs the model outside the page's thread. Messages in: {load: site}, {pause: true} while it loads, {ask, options, id},
// {stop: true}, {reset: true}.
import { CallStream, replyMessage } from "./calls.js";
import { fromOpenai, startTurns } from "./chat.js";
import { Decoder, keepOneLogit, outputLocations } from "./decoder.js";
import { generate } from "./generate.js";
import { Problem, asProblem } from "./problem.js";
import { fetchAll, forget } from "./store.js";
import { Text } from "./text.js";
import { declared } from "./tools.js";

// Keeps a reference to onnxruntime's memory, to measure it: onnxruntime does not expose it.
const memories = [];
WebAssembly.Memory = class extends WebAssembly.Memory {
  constructor(descriptor) {
    super(descriptor);
    memories.push(this);
  }
};

const MOST_THREADS = 8;
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
    else if (data.load) self.postMessage({ ready: await load(data.load) });
    else if (data.ask) self.postMessage({ id: data.id, done: await answer(data) });
  } catch (error) {
    const { message, hint } = asProblem(error);
    self.postMessage({ id: data.id, problem: { message, hint } });
  }
};

// Loads the site's model; returns a description of the backend.
async function load(site) {
  const gpu = site.model.device === "webgpu" && (await usableGpu(site.model.precision));
  const names = gpu ? site.runtime.webgpu : site.runtime.wasm;
  const wanted = { [names.wasm]: site.files[names.wasm] };
  for (const name of site.model.files) wanted[name] = site.files[name];
  const { contents, kept } = await fetchAll(wanted, progress(), undefined, { signal: pausing.signal });
  await forget(site.files);
  self.postMessage({ loading: { starting: true } });
  const json = (name) => (name in contents ? JSON.parse(new TextDecoder().decode(contents[name])) : {});
  const manifest = json("model/manifest.json");
  const text = new Text(json("model/tokenizer.json"), json("model/tokenizer_config.json"));
  const ort = await import(new URL(names.api, import.meta.url).href);
  ort.env.wasm.wasmPaths = { mjs: new URL(names.glue, import.meta.url).href };
  ort.env.wasm.wasmBinary = contents[names.wasm].buffer;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? threads() : 1;
  ort.env.logLevel = "error";
  const graph = contents[`model/${manifest.model}`];
  keepOneLogit(graph);
  const session = await ort.InferenceSession.create(graph, {
    logSeverityLevel: 3,
    executionProviders: [gpu ? "webgpu" : "wasm"],
    externalData: weights(manifest, contents),
    ...(gpu ? { preferredOutputLocation: outputLocations(manifest, "gpu-buffer") } : {}),
  });
  model = { text, decoder: new Decoder(ort, session, manifest), site };
  model.stops = new Set(site.model.stop_token_ids);
  const { turns, ...chat } = await startTurns(text, site.model.turns, model.stops);
  model.turns = turns;
  return {
    ...chat,
    device: gpu ? "WebGPU" : "WebAssembly",
    threads: ort.env.wasm.numThreads,
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

function figures(run) {
  return { ...run, tokens: run.tokens.length, ids: run.tokens, memory: memory() };
}

// Returns the bytes of onnxruntime's memory, including weights and caches, and the bytes of the caches.
function memory() {
  const runtime = memories.reduce((sum, each) => sum + each.buffer.byteLength, 0);
  return { runtime, caches: model?.decoder.cacheBytes ?? 0 };
}

// Returns the number of threads: of more than four reported processors half, because most cores report two.
function threads() {
  const said = navigator.hardwareConcurrency || 1;
  return Math.min(MOST_THREADS, said > 4 ? Math.ceil(said / 2) : said);
}

// Returns whether WebGPU is usable: a GPU supports the model's types, and the browser has JSPI, which onnxruntime needs.
async function usableGpu(precision) {
  if (!("Suspending" in WebAssembly)) return false;
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  if (!adapter) return false;
  return precision !== "float16" || adapter.features.has("shader-f16");
}

// The weights, by the file name in the graph.
function weights(manifest, contents) {
  const folder = `model/${manifest.model}`.replace(/[^/]*$/, "");
  return Object.keys(contents)
    .filter((name) => name.startsWith(`model/${manifest.model}_data`))
    .map((name) => ({ path: name.slice(folder.length), data: contents[name] }));
}
