// What runs a site's model: slm's own engine, or onnxruntime-web for other bundles. `slm web` decides, in site.json.
import { Decoder, keepOneLogit, outputLocations } from "./decoder.js";
import { Engine } from "./engine.js";
import { Problem } from "./problem.js";
import { engineFile, filesOf } from "./simd.js";

// Keeps a reference to each WebAssembly memory, to measure it: onnxruntime does not expose its own.
const memories = [];
WebAssembly.Memory = class extends WebAssembly.Memory {
  constructor(descriptor) {
    super(descriptor);
    memories.push(this);
  }
};

const MOST_THREADS = 8;

// Returns the bytes of all memories, including weights and caches.
export function memoryBytes() {
  return memories.reduce((sum, each) => sum + each.buffer.byteLength, 0);
}

// Returns a site's backend, before its files are there: {device, reason: why it is not the one that the model is for, or "",
// threads, wanted: files to load, place: where to load a file to (or null), open(contents, manifest): returns the decoder}.
// runtime: "wasm" or "webgpu" for that of onnxruntime-web; by default the fastest that this browser has.
export async function backendOf(site, runtime) {
  const count = self.crossOriginIsolated ? threads() : 1;
  return site.engine ? ownEngine(site, count) : onnxruntime(site, count, runtime);
}

function ownEngine(site, count) {
  const data = `model/${site.engine.data}`;
  const engine = new Engine(site.engine, site.files[data]?.bytes ?? 0, count);
  return {
    device: "WebAssembly",
    reason: "",
    get threads() {
      return engine.threads;
    },
    wanted: filesOf(site),
    place: (name) => (name === data ? engine.data : null),
    open: (contents) => engine.start(contents[engineFile()]),
  };
}

async function onnxruntime(site, count, runtime) {
  const meant = runtime !== "wasm" && site.model.device === "webgpu";
  const reason = meant ? await gpuProblem(site.model.float16) : "";
  const gpu = meant && !reason;
  if (runtime === "webgpu" && !gpu) throw new Problem(reason);
  const names = gpu ? site.runtime.webgpu : site.runtime.wasm;
  const open = async (contents, manifest) => {
    const ort = await import(new URL(names.api, import.meta.url).href);
    ort.env.wasm.wasmPaths = { mjs: new URL(names.glue, import.meta.url).href };
    ort.env.wasm.wasmBinary = contents[names.wasm].buffer;
    ort.env.wasm.numThreads = count;
    ort.env.logLevel = "error";
    const graph = contents[`model/${manifest.model}`];
    keepOneLogit(graph);
    const session = await ort.InferenceSession.create(graph, {
      logSeverityLevel: 3,
      executionProviders: [gpu ? "webgpu" : "wasm"],
      externalData: weights(manifest, contents),
      ...(gpu ? { preferredOutputLocation: outputLocations(manifest, "gpu-buffer") } : {}),
    });
    ort.env.wasm.wasmBinary = undefined; // it is compiled
    return new Decoder(ort, session, manifest);
  };
  const wanted = filesOf(site, gpu ? "webgpu" : "wasm");
  return { device: gpu ? "WebGPU" : "WebAssembly", reason, threads: count, wanted, place: () => null, open };
}

// Returns the number of threads: of more than four reported processors half, because most cores report two.
function threads() {
  const said = navigator.hardwareConcurrency || 1;
  return Math.min(MOST_THREADS, said > 4 ? Math.ceil(said / 2) : said);
}

// Returns why WebGPU cannot run the model, or "". float16: whether the model computes in float16.
async function gpuProblem(float16) {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  if (!adapter) return "this browser offers no GPU (WebGPU)";
  if (float16 && !adapter.features.has("shader-f16")) return "the GPU has no float16, which the model needs";
  if (!("Suspending" in WebAssembly)) return "this browser has no promise integration for WebAssembly (JSPI), which WebGPU needs";
  return "";
}

// The weights, by the file name in the graph.
function weights(manifest, contents) {
  const folder = `model/${manifest.model}`.replace(/[^/]*$/, "");
  return Object.keys(contents)
    .filter((name) => name.startsWith(`model/${manifest.model}_data`))
    .map((name) => ({ path: name.slice(folder.length), data: contents[name] }));
}
