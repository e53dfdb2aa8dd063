// The page's benchmark (?bench): every backend that the site has for this browser, one after the other.
import { COLUMNS, PLAN, cells, report } from "./bench-report.js";
import { Local } from "./local.js";
import { asProblem } from "./problem.js";
import { Progress } from "./progress.js";

const $ = (id) => document.getElementById(id);
// The longest wait for the browser's own measurement of memory, in milliseconds.
const MEMORY_MS = 10_000;
const USUAL = ["ask", "settings", "log", "figures"];

// Shows the benchmark instead of the usual page. attempt: runs an action and shows its error.
export async function showBench(site, attempt) {
  for (const id of USUAL) $(id).hidden = true;
  $("bench").hidden = false;
  $("where").textContent = "Everything is measured in this browser; nothing is sent.";
  const { bytes, stored } = await new Local(site).size();
  const missing = bytes - stored;
  $("bench-start").textContent = missing > 0 ? `Start (loads ${(missing / 1e6).toFixed(0)} MB)` : "Start";
  const { promptTokens, newTokens, rounds } = PLAN;
  $("bench-note").textContent =
    `A prompt of ${promptTokens} tokens, then ${newTokens} tokens, ${rounds} times with each backend. ` +
    "Close other tabs and connect the charger: a phone that saves energy is slow.";
  $("bench-start").onclick = () => void attempt(() => run(site));
  $("bench-copy").onclick = () => void copy();
}

async function run(site) {
  const stop = new AbortController();
  $("bench-start").disabled = true;
  $("bench-stop").hidden = false;
  $("bench-stop").onclick = () => stop.abort();
  $("bench-copy").hidden = $("bench-result").hidden = true;
  navigator.storage?.persist?.().catch(() => {});
  try {
    const results = [];
    for (const runtime of runtimes(site)) {
      if (stop.signal.aborted) break;
      results.push(await once(site, runtime, stop.signal));
      show(report(site, await browser(), results));
    }
  } finally {
    $("bench-status").textContent = stop.signal.aborted ? "Stopped." : "Done.";
    $("bench-start").disabled = false;
    $("bench-start").textContent = "Start again";
    $("bench-stop").hidden = true;
  }
}

// Loads the model with one backend and measures it.
async function once(site, runtime, signal) {
  const backend = new Local(site);
  const say = (text) => {
    $("bench-status").textContent = text;
  };
  const progress = new Progress();
  const pause = () => backend.pause();
  signal.addEventListener("abort", pause);
  try {
    const { bytes, stored } = await backend.size();
    const began = performance.now();
    const loaded = await backend.load((told) => say(told.starting ? "Starting the model …" : progress.line(told, performance.now())), runtime);
    const loadMs = performance.now() - began;
    const told = ({ round, of }) => say(round === 0 ? "Warming up …" : `${loaded.device}: round ${round} of ${of}`);
    const run = await backend.measure(PLAN, { told, signal });
    say("Measuring memory …");
    return { runtime, loaded, loadMs, stored: stored === bytes, run, pageBytes: await pageBytes() };
  } catch (error) {
    const { message, hint } = asProblem(error);
    return { runtime, problem: signal.aborted ? "stopped" : [message, hint].filter(Boolean).join(": ") };
  } finally {
    signal.removeEventListener("abort", pause);
    backend.close();
  }
}

// Returns the bytes that the browser measures for the page; null if it cannot, or waits too long for a garbage collection.
async function pageBytes() {
  const late = new Promise((resolve) => setTimeout(resolve, MEMORY_MS, null));
  const measured = performance.measureUserAgentSpecificMemory?.().catch(() => null);
  return (await Promise.race([measured ?? null, late]))?.bytes ?? null;
}

function runtimes(site) {
  return site.engine ? ["engine"] : Object.keys(site.runtime).sort(); // WebAssembly before WebGPU
}

// Describes the browser and its machine, as far as it says.
async function browser() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const { vendor = "", architecture = "", device = "", description = "" } = adapter?.info ?? {};
  return {
    browser: navigator.userAgent,
    processors: navigator.hardwareConcurrency ?? null,
    memory_gb: navigator.deviceMemory ?? null, // browsers round it, and say at most 8
    isolated: self.crossOriginIsolated === true,
    gpu: adapter ? { vendor, architecture, device, description, float16: adapter.features.has("shader-f16") } : null,
  };
}

function show(found) {
  const row = (kind, texts) => {
    const made = document.createElement("tr");
    for (const text of texts) {
      const cell = document.createElement(kind);
      cell.textContent = text;
      made.append(cell);
    }
    if (texts.length < COLUMNS.length) made.lastChild.colSpan = COLUMNS.length - texts.length + 1;
    return made;
  };
  $("bench-table").replaceChildren(row("th", COLUMNS), ...found.results.map((each) => row("td", cells(each))));
  $("bench-json").value = JSON.stringify(found, null, 1);
  $("bench-result").hidden = $("bench-copy").hidden = false;
}

async function copy() {
  try {
    await navigator.clipboard.writeText($("bench-json").value);
    $("bench-status").textContent = "Copied.";
  } catch {
    $("bench-json").focus(); // the browser does not allow it: the text is selected instead
    $("bench-json").select();
    $("bench-status").textContent = "Copy the selected text.";
  }
}
