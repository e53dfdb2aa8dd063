// The page: its display and its controls. local.js or remote.js generates the answers.
import { Local } from "./local.js";
import { Problem, asProblem } from "./problem.js";
import { Remote } from "./remote.js";

const $ = (id) => document.getElementById(id);
const SAMPLING = { temperature: "temperature", topK: "top-k", topP: "top-p", minP: "min-p", newTokens: "new-tokens" };
const WORDS = {
  end: "the text is at its end",
  length: "cut at the limit of new tokens",
  context: "cut because the context is full",
  stopped: "stopped",
};
// The largest model, in bytes, that is downloaded without a click: the user may pay for the traffic.
const UNASKED_BYTES = 32 << 20;

let site = null;
let backend = null;
let messages = []; // the messages of the conversation
let running = null; // an AbortController while an answer is generated
let ready = false;

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
const talking = () => document.forms.ask.elements.mode.value === "talk";

function show(problem) {
  $("problem").hidden = problem === null;
  if (problem) $("problem").textContent = problem.hint ? `${problem.message}: ${problem.hint}` : problem.message;
}

// Runs an action and shows its error, if it fails.
async function attempt(action) {
  try {
    show(null);
    return await action();
  } catch (error) {
    show(asProblem(error));
    return undefined;
  }
}

function refresh() {
  $("write").disabled = !ready || running !== null;
  $("stop").disabled = running === null;
  $("clear").disabled = running !== null;
  $("log").setAttribute("aria-busy", String(running !== null));
  for (const input of document.querySelectorAll("#modes input")) input.disabled = running !== null;
  const talk = talking();
  $("prompt-label").textContent = talk ? "What you say" : "Text to continue";
  $("write").textContent = talk ? "Say" : "Write";
  for (const each of document.querySelectorAll(".for-talk")) each.hidden = !talk || !site?.model.system;
  $("note").hidden = !talk || !site || site.model.tuned;
  for (const id of ["temperature", "top-k", "top-p", "min-p", "seed"]) $(id).disabled = $("greedy").checked;
}

function options() {
  const found = {};
  for (const [name, id] of Object.entries(SAMPLING)) {
    const field = $(id);
    if (!field.checkValidity()) {
      $("settings").open = true;
      field.focus();
      throw new Problem(`${field.labels[0].textContent}: ${field.validationMessage}`);
    }
    found[name] = field.valueAsNumber;
  }
  if (!$("seed").checkValidity()) throw new Problem(`Seed: ${$("seed").validationMessage}`);
  found.seed = $("seed").value === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : $("seed").valueAsNumber;
  if ($("greedy").checked) found.temperature = 0;
  return found;
}

function paragraph(kind, who, text = "") {
  const made = document.createElement("p");
  made.className = kind;
  if (who) {
    const name = document.createElement("span");
    name.className = "who";
    name.textContent = who;
    made.append(name);
  }
  const said = document.createElement("span");
  said.textContent = text;
  made.append(said);
  $("log").append(made);
  $("log").scrollTop = $("log").scrollHeight;
  return said;
}

async function write() {
  const chosen = options();
  const prompt = $("prompt").value;
  if (talking() && !prompt.trim()) throw new Problem("nothing is said", "type something");
  if (!talking() && !prompt) throw new Problem("there is nothing to go on with", "type the beginning of a text");
  const ask = talking() ? { messages: begin(prompt) } : { prompt };
  let into;
  if (talking()) {
    paragraph("user", "you", prompt);
    into = paragraph("model", site.name);
    $("prompt").value = "";
  } else {
    $("log").replaceChildren();
    const given = paragraph("text", "", prompt);
    given.className = "given";
    into = document.createElement("span");
    given.after(into);
  }
  into.className = "new";
  running = new AbortController();
  refresh();
  $("figures").textContent = "Reading …";
  let text = "";
  const told = (piece) => {
    if (piece.text) into.textContent = text += piece.text;
    if (piece.of) $("figures").textContent = `Reading: ${piece.read.toLocaleString()} of ${piece.of.toLocaleString()} tokens`;
    const log = $("log");
    if (piece.text && log.scrollHeight - log.scrollTop - log.clientHeight < 80) log.scrollTop = log.scrollHeight;
  };
  let run = null;
  try {
    run = await backend.answer(ask, chosen, { told, signal: running.signal });
    report(run, chosen);
  } finally {
    if (talking()) end(ask.messages, text, run === null, into);
    if (run === null) $("figures").textContent = "";
    running = null;
    refresh();
    $("prompt").focus({ preventScroll: true });
  }
}

// Returns the conversation with the new message.
function begin(prompt) {
  const system = site.model.system ? $("system").value.trim() : "";
  const before = messages.filter(({ role }) => role !== "system");
  const first = system ? [{ role: "system", content: system }] : [];
  return [...first, ...before, { role: "user", content: prompt }];
}

// Adds an answer to the conversation. Without an answer the question is removed too, because turns alternate.
function end(asked, text, failed, into) {
  if (text.trim()) messages = [...asked, { role: "assistant", content: text.trim() }];
  else if (failed) {
    $("prompt").value = asked.at(-1).content;
    into.parentElement.previousSibling.remove();
    into.parentElement.remove();
  } else into.textContent = "(no answer)";
}

function report(run, chosen) {
  const parts = run.tokens === null ? [] : [`${run.tokens.toLocaleString()} tokens`];
  if (run.tokensPerSecond) parts.push(`${run.tokensPerSecond.toFixed(1)} tokens/s`);
  if (run.ttftMs !== null) parts.push(`first token after ${run.ttftMs.toFixed(0)} ms`);
  parts.push(WORDS[run.reason]);
  if (chosen.temperature > 0) parts.push(`seed ${chosen.seed}`);
  if (run.forgotten) parts.push(`exchanges forgotten, the context being full: ${run.forgotten}`);
  if (run.memory) parts.push(memory(run.memory));
  $("figures").textContent = parts.join(" · ");
  $("figures").dataset.run = JSON.stringify(run);
  void measured();
}

const memory = ({ runtime, caches }) => `memory ${megabytes(runtime)}, of it caches ${megabytes(caches)}`;

// Shows the browser's own memory measurement, if it has one; that takes some seconds.
async function measured() {
  const before = $("figures").textContent;
  const found = await performance.measureUserAgentSpecificMemory?.().catch(() => null);
  if (found && $("figures").textContent === before) {
    $("figures").textContent = `${before} · ${megabytes(found.bytes)} for all of the page, by the browser`;
  }
}

async function load() {
  $("load").hidden = true;
  $("loading").hidden = false;
  $("progress").hidden = false;
  const told = ({ starting, loaded, total }) => {
    if (starting) {
      $("progress").removeAttribute("value");
      $("progress-text").textContent = "Starting the model …";
      return;
    }
    $("progress").value = loaded / total;
    $("progress-text").textContent = `Loading: ${megabytes(loaded)} of ${megabytes(total)}`;
  };
  const started = performance.now();
  try {
    const found = await backend.load(told);
    ready = true;
    $("loading").hidden = true;
    describe(found, performance.now() - started);
  } catch (error) {
    $("progress").hidden = true;
    $("progress-text").textContent = "The model is not loaded.";
    $("load").textContent = "Try again";
    $("load").hidden = false;
    throw error;
  } finally {
    refresh();
  }
}

function describe(found, milliseconds) {
  const threads = found.threads === 1 ? "1 thread" : `${found.threads} threads`;
  const alone = found.isolated ? "" : " (the site sends no COOP and COEP headers: one thread is all there is)";
  const gpu = found.device === "WebGPU" ? " (experimental)" : `, ${threads}${alone}`;
  $("where").textContent = `Runs in this browser: ${found.device}${gpu}, ${found.precision}. What you type stays here.`;
  $("where").dataset.found = JSON.stringify({ ...found, loadMs: milliseconds });
  $("figures").textContent = `loaded in ${(milliseconds / 1e3).toFixed(1)} s · ${memory(found.memory)}`;
  $("remove").hidden = !found.kept;
  void keep(found.kept);
}

// Shows whether everything that the page needs offline is stored.
async function keep(model) {
  const late = new Promise((resolve) => setTimeout(resolve, 10_000, null));
  const page = model && navigator.serviceWorker ? await Promise.race([navigator.serviceWorker.ready, late]) : null;
  $("kept").textContent = page
    ? "Page and model are stored in this browser and work without a network."
    : "This page needs the network next time: the browser does not store all of it.";
}

async function connect() {
  for (const each of document.querySelectorAll(".for-key")) each.hidden = !site.key;
  if (site.key && !backend.key) {
    $("settings").open = true;
    $("where").textContent = "Answers come from the server, which requires an API key.";
    return;
  }
  const names = await backend.models();
  $("models").replaceChildren(...names.map((name) => new Option(name)));
  for (const each of document.querySelectorAll(".for-models")) each.hidden = names.length < 2;
  backend.model = names[0];
  $("where").textContent = "Answers come from the server of this page.";
  ready = true;
  refresh();
}

// Stores the page for offline use, and shows when there is a newer version.
async function register() {
  if (!("serviceWorker" in navigator)) return;
  const registration = await navigator.serviceWorker.register("sw.js", { updateViaCache: "none" }).catch(() => null);
  if (!registration) return;
  const told = () => {
    $("renew").hidden = !(registration.waiting && navigator.serviceWorker.controller);
  };
  registration.addEventListener("updatefound", () => registration.installing?.addEventListener("statechange", told));
  $("renew").onclick = () => {
    navigator.serviceWorker.addEventListener("controllerchange", () => location.reload());
    registration.waiting?.postMessage("now");
  };
  told();
  registration.update().catch(() => {}); // fails when offline
}

async function start() {
  const response = await fetch("site.json", { cache: "no-cache" }).catch(() => null);
  if (!response?.ok) throw new Problem("the site cannot be reached", "try again later");
  site = await response.json();
  document.title = `${site.name} · slm`;
  $("name").textContent = site.name;
  $("version").textContent = `slm ${site.slm}`;
  const { elements } = document.forms.ask;
  elements.mode.value = site.model.chat && site.model.tuned ? "talk" : "continue";
  elements.mode[1].disabled = !site.model.chat;
  $("modes").hidden = !site.model.chat;
  $("note").textContent = "This model was trained on plain text: it continues your text rather than answering.";
  refresh();
  if (site.mode === "server") {
    backend = new Remote();
    $("new-tokens").max = site.new_tokens;
    if ($("new-tokens").valueAsNumber > site.new_tokens) $("new-tokens").value = site.new_tokens;
    await register(); // removes the service worker of another site at this address
    await connect();
    return;
  }
  $("licences").hidden = false;
  backend = new Local(site);
  await register();
  const { bytes, here } = await backend.size();
  if (here || bytes <= UNASKED_BYTES) return load();
  $("where").textContent = "The model runs in this browser once it is loaded. What you type stays here.";
  $("loading").hidden = false;
  $("progress").hidden = true;
  $("progress-text").textContent = `The model has ${megabytes(bytes)}.`;
  $("load").textContent = `Load the model (${megabytes(bytes)})`;
  $("load").hidden = false;
}

document.forms.ask.addEventListener("submit", (event) => {
  event.preventDefault();
  if (ready && !running) void attempt(write);
});
document.forms.ask.addEventListener("change", refresh);
$("greedy").addEventListener("change", refresh);
$("stop").onclick = () => running?.abort();
$("load").onclick = () => void attempt(load);
$("clear").onclick = () => {
  messages = [];
  $("log").replaceChildren();
  $("figures").textContent = "";
  show(null);
};
$("key").onchange = () => {
  backend.key = $("key").value.trim();
  void attempt(connect);
};
$("models").onchange = () => {
  backend.model = $("models").value;
};
$("remove").onclick = () =>
  void attempt(async () => {
    await backend.remove();
    $("remove").hidden = true;
    $("kept").textContent = "The stored files are deleted; the model runs until the page is closed.";
  });
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) document.forms.ask.requestSubmit();
  else if (event.key === "Escape") running?.abort();
});

void attempt(start);
