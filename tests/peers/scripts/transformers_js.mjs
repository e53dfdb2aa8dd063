// Run by the tests with transformers.js: a bundle and batches of prompts to greedy tokens, shorter rows padded on the left.
// Arguments: the directory, how many tokens, the batches as JSON, and how many positions of sliding caches to hand over,
// 0 for none.
import { AutoModelForCausalLM, DynamicCache, Tensor, env } from "@huggingface/transformers";

env.allowRemoteModels = false;
const [, , path, count, batches, positions] = process.argv;
const model = await AutoModelForCausalLM.from_pretrained(path);
const ids = (rows) => new Tensor("int64", BigInt64Array.from(rows.flat().map(BigInt)), [rows.length, rows[0].length]);

function caches() {
  const entries = {};
  for (const { name, type, shape } of model.sessions.model.inputMetadata) {
    if (!name.startsWith("past_key_values")) continue;
    const dims = [1, shape[1], shape[2] === "past_window" ? +positions : 0, shape[3]];
    const numbers = type === "int8" ? Int8Array : Float32Array;
    entries[name] = new Tensor(type, new numbers(dims.reduce((a, b) => a * b)), dims);
  }
  return { past_key_values: new DynamicCache(entries) };
}

const answers = [];
for (const prompts of JSON.parse(batches)) {
  const longest = Math.max(...prompts.map((prompt) => prompt.length));
  const padding = (prompt, value) => Array(longest - prompt.length).fill(value);
  const output = await model.generate({
    input_ids: ids(prompts.map((prompt) => [...padding(prompt, model.config.pad_token_id), ...prompt])),
    attention_mask: ids(prompts.map((prompt) => [...padding(prompt, 0), ...prompt.map(() => 1)])),
    ...(+positions ? caches() : {}),
    max_new_tokens: +count,
    do_sample: false,
  });
  answers.push(output.tolist().map((row) => row.slice(longest).map(Number)));
}
console.log(JSON.stringify({ version: env.version, answers }));
