// The page: its display and its controls. local.js or remote.js generates the answers.
import { Conversation } from "./conversation.js";
import { Local } from "./local.js";
import { strip } from "./json.js";
import { Answer, paragraph, span } from "./log.js";
import { Problem, asProblem } from "./problem.js";
import { FULL, Progress, megabytes, storageNote } from "./progress.js";
import { Remote } from "./remote.js";
import { Results } from "./results.js";
import { declared } from "./tools.js";

const $ = (id) => document.getElementById(id);
const SAMPLING = { temperature: "temperature", topK: "top-k", topP: "top-p", minP: "min-p", newTokens: "new-tokens" };
const WORDS = {
  end: "complete",
  length: "cut at the maximum of new tokens",
  context: "cut because the context is full",
  stopped: "stopped",
};
// The largest model, in bytes, that is downloaded without a click: the user may pay for the traffic.
const UNASKED_BYTES = 32 << 20;
const UNTUNED_NOTE = "This model was trained on plain text: it continues your text rather than answering.";
const TOOLS_NOTE = "A list of functions in OpenAI's format. You enter the results of the model's calls; the page executes nothing.";

let site = null;
let backend = null;
const conversation = new Conversation();
const results = new Results($("result-fields"));
let running = null; // an AbortController while an answer is generated
let ready = false;
let paused = false; // whether the person has ended the download
let others = []; // the paragraphs of the mode that is not chosen

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
  const talk = talking();
  const model = site?.model ?? {};
  const waiting = talk && running === null && conversation.calls.length > 0; // for results of calls
  $("write").disabled = !ready || running !== null;
  $("stop").disabled = running === null;
  $("clear").disabled = running !== null;
  $("log").setAttribute("aria-busy", String(running !== null));
  for (const input of document.querySelectorAll("#modes input")) input.disabled = running !== null || (input.value === "talk" && !model.chat);
  $("request").hidden = waiting;
  $("results").hidden = !waiting;
  $("prompt-label").textContent = talk ? "Message" : "Text to continue";
  $("write").textContent = waiting ? "Send results" : talk ? "Send" : "Generate";
  $("discard").hidden = !waiting;
  for (const each of document.querySelectorAll(".for-talk")) each.hidden = !talk || !model.system;
  for (const each of document.querySelectorAll(".for-tools")) each.hidden = !talk;
  $("tools").disabled = Boolean(model.noTools);
  $("tools-note").textContent = model.noTools ? `Tools are not available: ${model.noTools}.` : TOOLS_NOTE;
  const note = model.noChat ? `Chats are not available: ${model.noChat}.` : talk && site && !model.tuned ? UNTUNED_NOTE : "";
  $("note").textContent = note;
  $("note").hidden = !note;
  for (const id of ["temperature", "top-k", "top-p", "min-p", "seed"]) $(id).disabled = $("greedy").checked;
}

// Returns the tools of the settings as JSON text; "" for none.
function tools() {
  const text = strip($("tools").value);
  if (!text || $("tools").disabled) return "";
  try {
    const found = declared(text);
    $("tools").removeAttribute("aria-invalid");
    return found.length ? text : "";
  } catch (problem) {
    $("tools").setAttribute("aria-invalid", "true");
    $("settings").open = true;
    throw problem;
  }
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

async function write() {
  const chosen = options();
  const asked = talking() ? ask() : continuation();
  running = new AbortController();
  refresh();
  $("figures").textContent = "Reading …";
  const told = (piece) => {
    if (piece.of) $("figures").textContent = `Reading: ${piece.read.toLocaleString()} of ${piece.of.toLocaleString()} tokens`;
    else asked.answer.told(piece);
  };
  let run = null;
  try {
    run = await backend.answer(asked.body, chosen, { told, signal: running.signal });
    report(run, chosen);
  } finally {
    if (asked.body.messages) end(asked, run);
    if (run === null) $("figures").textContent = "";
    running = null;
    refresh();
    if (talking() && conversation.calls.length) results.focus();
    else if (matchMedia("(pointer: fine)").matches) $("prompt").focus({ preventScroll: true }); // a phone's keyboard would hide the text
  }
}

// Begins to continue a text.
function continuation() {
  const prompt = $("prompt").value;
  if (!prompt) throw new Problem("the text is empty", "enter the beginning of a text");
  $("log").replaceChildren();
  const given = paragraph("text", "", prompt);
  given.className = "given";
  const into = span("new");
  given.after(into);
  return { body: { prompt }, answer: new Answer(into) };
}

// Begins an answer of a conversation: to a message, or to the results of calls. shown: the number of paragraphs before it;
// restore: what to do if it fails.
function ask() {
  const declarations = tools();
  const { calls } = conversation;
  const prompt = $("prompt").value;
  if (!calls.length && !strip(prompt)) throw new Problem("the message is empty", "enter a message");
  const values = results.values;
  const messages = calls.length
    ? conversation.withResults(values)
    : conversation.withRequest(site.model.system ? $("system").value.trim() : "", prompt);
  if (calls.length) calls.forEach((call, i) => paragraph("result", `result of ${call.function.name}`, values[i]));
  else {
    paragraph("user", "you", prompt);
    $("prompt").value = "";
  }
  const answer = new Answer(paragraph("model", site.name));
  const restore = () => {
    if (!calls.length) $("prompt").value = prompt;
    answer.remove(calls.length || 1);
  };
  return { body: { messages, ...(declarations ? { tools: declarations } : {}) }, answer, restore };
}

// Adds an answer to the conversation. If it failed without text, what asked for it returns to its fields.
function end({ body, answer, restore }, run) {
  if (run === null && !strip(answer.text)) return restore();
  const message = run?.message ?? { role: "assistant", content: strip(answer.text) };
  answer.show(message);
  if (!conversation.record(body.messages, message)) answer.show({ content: "(no answer)" });
  return results.ask(conversation.calls);
}

function report(run, chosen) {
  const parts = run.tokens === null ? [] : [`${run.tokens.toLocaleString()} tokens`];
  if (run.tokensPerSecond) parts.push(`${run.tokensPerSecond.toFixed(1)} tokens/s`);
  if (run.ttftMs !== null) parts.push(`first token after ${run.ttftMs.toFixed(0)} ms`);
  parts.push(WORDS[run.reason]);
  if (chosen.temperature > 0) parts.push(`seed ${chosen.seed}`);
  if (run.forgotten) parts.push(`oldest exchanges dropped, because the context is full: ${run.forgotten}`);
  if (run.memory) parts.push(memory(run.memory));
  $("figures").textContent = parts.join(" · ");
  $("figures").dataset.run = JSON.stringify(run);
  void measured();
}

const memory = ({ runtime, caches }) => `memory ${megabytes(runtime)}, including caches of ${megabytes(caches)}`;

// Shows the browser's own memory measurement, if it has one; that takes some seconds.
async function measured() {
  const before = $("figures").textContent;
  const found = await performance.measureUserAgentSpecificMemory?.().catch(() => null);
  if (found && $("figures").textContent === before) {
    $("figures").textContent = `${before} · ${megabytes(found.bytes)} for all of the page, by the browser`;
  }
}

// Shows the paragraphs of the other mode: a conversation goes on where it was, and a text does not end up in it.
function swap() {
  const now = [...$("log").childNodes];
  $("log").replaceChildren(...others);
  others = now;
  $("log").scrollTop = $("log").scrollHeight;
}

async function load() {
  $("load").hidden = true;
  $("loading").hidden = false;
  $("progress").hidden = false;
  $("progress").value = 0;
  const progress = new Progress();
  const told = (report) => {
    $("pause").hidden = !report.fetched && !report.waiting;
    if (report.starting) {
      $("progress").removeAttribute("value");
      $("progress-text").textContent = "Starting the model …";
      return;
    }
    if (report.full && $("storage").hidden) inform(FULL);
    if (report.total) $("progress").value = report.loaded / report.total;
    $("progress-text").textContent = progress.line(report, performance.now());
  };
  const started = performance.now();
  paused = false;
  try {
    const found = await backend.load(told);
    ready = true;
    restrict(found);
    $("loading").hidden = true;
    describe(found, performance.now() - started);
  } catch (error) {
    await offer(paused ? "" : "Try again");
    if (!paused) throw error;
  } finally {
    $("pause").hidden = true;
    refresh();
  }
}

// Offers to load the model, or the rest of it. label: the button's text, "" for one that says what it does.
async function offer(label = "") {
  const size = await backend.size();
  const { bytes, stored } = size;
  $("loading").hidden = false;
  $("progress").hidden = stored === 0;
  $("progress").value = stored / bytes;
  $("progress-text").textContent = stored
    ? `${megabytes(stored)} of ${megabytes(bytes)} are stored in this browser.`
    : `The model is a download of ${megabytes(bytes)}.`;
  $("load").textContent = label || (stored ? `Continue (${megabytes(bytes - stored)})` : "Load the model");
  $("load").hidden = false;
  inform(storageNote(size), size.granted === null);
}

// Says that the files will not be stored, or "". temporary: whether the browser never stores any.
function inform(note, temporary = false) {
  $("storage").textContent = note;
  $("storage").hidden = !note;
  $("pause").textContent = note || temporary ? "Cancel" : "Pause"; // what is not stored cannot be continued
}

// Removes what the page cannot do with the model.
function restrict({ noChat, noTools }) {
  const { model } = site;
  if (!model.chat) return;
  if (noChat) {
    [model.chat, model.noChat] = [false, noChat];
    document.forms.ask.elements.mode.value = "continue";
  }
  model.noTools = noTools;
}

function describe(found, milliseconds) {
  const threads = found.threads === 1 ? "1 thread" : `${found.threads} threads`;
  const alone = found.isolated ? "" : " (the site sends no COOP and COEP headers: one thread is all there is)";
  const gpu = found.device === "WebGPU" ? " (experimental)" : `, ${threads}${alone}`;
  const slower = found.reason ? ` It is slower than on a GPU: ${found.reason}.` : "";
  $("where").textContent = `Runs in this browser: ${found.device}${gpu}, ${found.precision}.${slower} What you type stays here.`;
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
  site = await response.json().catch(() => {
    throw new Problem("site.json is damaged", "make the site again with slm web, or copy it again");
  });
  document.title = `${site.name} · slm`;
  $("name").textContent = site.name;
  $("version").textContent = `slm ${site.slm}`;
  const { elements } = document.forms.ask;
  elements.mode.value = site.model.chat && site.model.tuned ? "talk" : "continue";
  $("modes").hidden = !site.model.chat;
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
  if (new URLSearchParams(location.search).has("bench")) {
    const { showBench } = await import("./bench.js");
    return showBench(site, attempt);
  }
  $("measure").hidden = false;
  const { bytes, stored } = await backend.size();
  if (stored === bytes || bytes <= UNASKED_BYTES) return load();
  $("where").textContent = "The model runs in this browser once it is loaded. What you type stays here.";
  return offer();
}

document.forms.ask.addEventListener("submit", (event) => {
  event.preventDefault();
  if (ready && !running) void attempt(write);
});
document.forms.ask.addEventListener("change", refresh);
for (const input of document.querySelectorAll("#modes input")) input.addEventListener("change", swap);
$("greedy").addEventListener("change", refresh);
$("stop").onclick = () => running?.abort();
$("load").onclick = () => {
  // Who loads a large model wants to keep it: without this a browser may remove it when the disk is full.
  navigator.storage?.persist?.().catch(() => {});
  void attempt(load);
};
$("pause").onclick = () => {
  paused = true;
  backend.pause();
};
$("clear").onclick = () => {
  conversation.messages = [];
  results.clear();
  $("log").replaceChildren();
  others = [];
  $("figures").textContent = "";
  show(null);
  refresh();
};
$("discard").onclick = () => {
  conversation.drop();
  results.clear();
  refresh();
  $("prompt").focus();
};
$("tools").onchange = () => void attempt(tools);
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
