// transformers.js, which runs a portable bundle with onnxruntime-web.
import { AutoModelForCausalLM, Tensor, env } from "/transformers/transformers.min.js";

export async function start({ model, threads }) {
  Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: "/", useBrowserCache: false });
  env.backends.onnx.wasm.wasmPaths = "/ort/";
  env.backends.onnx.wasm.numThreads = threads;
  const loaded = await AutoModelForCausalLM.from_pretrained(model.slice(1), { device: "wasm" });
  const once = async (ids, count) => {
    const times = [];
    const row = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    const began = performance.now();
    await loaded.generate({
      input_ids: row(ids),
      attention_mask: row(ids.map(() => 1)),
      max_new_tokens: count,
      min_new_tokens: count,
      do_sample: false,
      streamer: { put: () => times.push(performance.now()), end() {} },
    });
    // The first call has the prompt, the second the first token.
    return { read_ms: times[1] - began, decode_ms: times.at(-1) - times[1], steps: times.length - 2 };
  };
  const turn = async ({ ids, newTokens }) => {
    await once(ids, 8);
    return once(ids, newTokens + 1);
  };
  return { turn, threads, about: `transformers.js ${env.version}` };
}
