// Measures how fast a decoder reads a prompt and writes greedily after it; runs in the worker.
import { breath } from "./generate.js";
import { PIECE } from "./resumable.js";
import { Sampler } from "./sampling.js";

const TEXT = "Once upon a time there was a little owl who lived in an old oak tree with her mother and two brothers. ";

// Returns so many token ids of a text; every model has some for it.
export function promptIds(text, count) {
  const found = text.encode(TEXT);
  if (!found.length) return Array(count).fill(0);
  return Array.from({ length: count }, (_, i) => found[i % found.length]);
}

// Reads the prompt `ids` and writes `newTokens` tokens, `rounds` times after a short round that does not count, in which the
// browser compiles. Returns {ttftMs, tokensPerSecond}: a value for each round, fewer if it was stopped. told: called with
// {round, of}.
export async function measure(decoder, ids, { newTokens, rounds }, { told = () => {}, stopped = () => false } = {}) {
  const found = { ttftMs: [], tokensPerSecond: [] };
  for (let round = 0; round <= rounds; round++) {
    told({ round, of: rounds });
    const run = await once(decoder, ids, round === 0 ? 8 : newTokens, stopped);
    if (run === null) break;
    if (round === 0) continue;
    found.ttftMs.push(run.ttftMs);
    found.tokensPerSecond.push((1e3 * newTokens) / run.decodeMs);
  }
  decoder.reset();
  return found;
}

async function once(decoder, ids, newTokens, stopped) {
  const sampler = new Sampler({ temperature: 0 });
  decoder.reset();
  let [logits, ttftMs, decodeMs] = [null, 0, 0];
  for (let read = 0; read < ids.length; read += PIECE) {
    await breath();
    if (stopped()) return null;
    const before = performance.now();
    logits = await decoder.step(ids.slice(read, read + PIECE));
    ttftMs += performance.now() - before;
  }
  let token = sampler.choose(logits);
  for (let i = 0; i < newTokens; i++) {
    await breath();
    if (stopped()) return null;
    const before = performance.now();
    token = sampler.choose(await decoder.step([token]));
    decodeMs += performance.now() - before;
  }
  return { ttftMs, decodeMs };
}
