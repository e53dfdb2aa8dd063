// llama.cpp in WebAssembly, as wllama builds it.
import { Wllama } from "/wllama/index.js";

export async function start({ model, threads, context }) {
  const quiet = { debug() {}, log() {}, warn: console.warn, error: console.error };
  const wllama = new Wllama({ default: "/wllama/wasm/wllama.wasm" }, { logger: quiet, suppressNativeLog: true });
  const blob = await (await fetch(model)).blob();
  const options = { n_ctx: context, n_threads: threads, n_gpu_layers: 0, n_parallel: 1, cache_type_k: "f16", cache_type_v: "f16" };
  await wllama.loadModel([blob], options);
  const once = (prompt, max_tokens) =>
    wllama.createCompletion({ prompt, max_tokens, temperature: 0, ignore_eos: true, cache_prompt: false });
  // It takes no ids, but its tokenizer makes the same of the text, but for a token at either end.
  const turn = async ({ ids, text, newTokens }) => {
    await once(text, 8);
    const { timings } = await once(text, newTokens + 1); // the first token comes with the prompt
    const { prompt_n, prompt_ms, predicted_n, predicted_ms } = timings;
    if (Math.abs(prompt_n - ids.length) > 2) throw new Error(`it read ${prompt_n} tokens, not ${ids.length}`);
    return { read_ms: (prompt_ms * ids.length) / prompt_n, decode_ms: predicted_ms, steps: predicted_n - 1 };
  };
  const about = `llama.cpp ${Wllama.getLibllamaVersion()}`;
  return { turn, threads: wllama.isMultithread() ? wllama.getNumThreads() : 1, about };
}
