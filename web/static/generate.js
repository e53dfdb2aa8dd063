// The generation loop, as in slm.runtime.generate.
import { Problem } from "./problem.js";
import { PIECE } from "./resumable.js";
import { Sampler } from "./sampling.js";
import { TextStream } from "./text.js";

// Lets the worker receive messages, such as "stop": a step does not yield.
const { port1, port2 } = new MessageChannel();
export const breath = () =>
  new Promise((resolve) => {
    port1.onmessage = resolve;
    port2.postMessage(null);
  });

// Generates text: calls `told` with pieces {text}, and with {read, of} during the prefill of a long prompt; returns figures.
// options: those of Sampler and newTokens; stops: ids that end a text; resume: whether to reuse the caches of a common prefix;
// shown: special tokens whose spelling is part of the text.
export async function generate(decoder, text, ids, options, { stops, resume = false, told, stopped, shown }) {
  if (!ids.length) throw new Problem("the prompt is empty", "enter text");
  if (ids.length >= decoder.context) {
    throw new Problem(`the text has ${ids.length} tokens and the model's context ${decoder.context}`, "shorten the text");
  }
  const sampler = new Sampler(options);
  const stream = new TextStream(text, shown);
  const run = { promptTokens: ids.length, tokens: [], ttftMs: null, tokensPerSecond: null, reason: "stopped" };
  const started = performance.now();
  if (!resume) decoder.reset();
  let logits = null;
  for (let read = decoder.resume(ids); read < ids.length; read += PIECE) {
    await breath();
    if (stopped()) return run;
    logits = await decoder.step(ids.slice(read, read + PIECE));
    if (ids.length > PIECE) told({ read: Math.min(read + PIECE, ids.length), of: ids.length });
  }
  if (resume) decoder.keep();
  let token = sampler.choose(logits);
  run.ttftMs = performance.now() - started;
  let decodeMs = 0;
  while (!stops.has(token)) {
    run.tokens.push(token);
    const piece = stream.push(token);
    if (piece) told({ text: piece });
    if (run.tokens.length === options.newTokens) run.reason = "length";
    else if (decoder.ids.length === decoder.context) run.reason = "context";
    if (run.reason !== "stopped") break;
    await breath();
    if (stopped()) break;
    const before = performance.now();
    token = sampler.choose(await decoder.step([token]));
    decodeMs += performance.now() - before; // the time to display a piece does not count
    run.tokensPerSecond = (1e3 * run.tokens.length) / decodeMs;
  }
  if (stops.has(token)) run.reason = "end";
  const rest = stream.finish();
  if (rest) told({ text: rest });
  return run;
}
