// The result of the benchmark as rows for people and as JSON for documents. docs/web.md describes the fields; a change of their
// meaning gets another number in `slm_bench`.
import { megabytes } from "./progress.js";

export const FORMAT = 1;

export const PLAN = { promptTokens: 128, newTokens: 64, rounds: 3 };

export const COLUMNS = ["backend", "tokens/s", "first token", "load", "memory"];

// site: site.json; where: what browser() returned; results: [{runtime, loaded, run, pageBytes}] or [{runtime, problem}].
export function report(site, where, results, date = new Date()) {
  const bytes = site.model.files.reduce((sum, name) => sum + site.files[name].bytes, 0);
  const { parameters, precision, device } = site.model;
  return {
    slm_bench: FORMAT,
    date: date.toISOString().slice(0, 19) + "Z",
    slm: site.slm,
    model: { name: site.name, parameters, precision, device, bytes },
    ...where,
    prompt_tokens: PLAN.promptTokens,
    new_tokens: PLAN.newTokens,
    results: results.map(entry),
  };
}

// Returns the cells of a result's row.
export function cells({ backend, threads, problem, tokens_per_s, ttft_ms, load_ms, memory_bytes }) {
  if (problem !== undefined) return [backend, problem];
  const speed = spread(tokens_per_s);
  const shown = speed === null ? "–" : `${speed.median.toFixed(1)} (${speed.min.toFixed(1)} to ${speed.max.toFixed(1)})`;
  const first = spread(ttft_ms);
  return [
    backend === "WebGPU" ? backend : `${backend}, ${threads} thread${threads === 1 ? "" : "s"}`,
    shown,
    first === null ? "–" : `${first.median.toFixed(0)} ms`,
    `${(load_ms / 1e3).toFixed(1)} s`,
    megabytes(memory_bytes),
  ];
}

// Returns {median, min, max} of values; null if there are none.
export function spread(values) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  const median = sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
  return { median, min: sorted[0], max: sorted.at(-1) };
}

function entry({ runtime, problem, loaded, loadMs, stored, run, pageBytes }) {
  const engine = { engine: "slm", wasm: "onnxruntime-web", webgpu: "onnxruntime-web" }[runtime];
  const backend = runtime === "webgpu" ? "WebGPU" : "WebAssembly";
  if (problem !== undefined) return { backend, engine, problem };
  const round = (values) => values.map((value) => Number(value.toPrecision(4)));
  return {
    backend,
    engine,
    threads: loaded.threads,
    load_ms: Math.round(loadMs),
    from_store: stored,
    ttft_ms: round(run.ttftMs),
    tokens_per_s: round(run.tokensPerSecond),
    memory_bytes: run.memory.runtime,
    page_bytes: pageBytes,
  };
}
