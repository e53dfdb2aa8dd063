// slm's page: one of its backends, without the rest of the page. Runs on the origin of `slm web`.
const { Local } = await import(new URL("local.js", location.href).href);
const site = await (await fetch("site.json")).json();
const backend = new Local(site);

// Returns a function that takes a turn: {ids, newTokens} to {read_ms, decode_ms}, after a short run that does not count.
export async function start() {
  const found = await backend.load(() => {});
  const turn = async ({ ids, newTokens }) => {
    const control = { told: () => {}, signal: new AbortController().signal };
    const run = await backend.measure({ ids, newTokens, rounds: 1 }, control);
    return { read_ms: run.ttftMs[0], decode_ms: (1e3 * newTokens) / run.tokensPerSecond[0], steps: newTokens };
  };
  return { turn, threads: found.threads, about: site.engine ? "slm's engine" : "onnxruntime-web" };
}
