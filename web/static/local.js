// Generates answers with the model in this browser, which runs in a worker.
import { Problem } from "./problem.js";
import { filesOf } from "./simd.js";
import { openStore, removeAll, room } from "./kept.js";

export class Local {
  #worker;
  #site;
  #listeners = new Map();
  #loading = null;
  #count = 0;

  constructor(site) {
    this.#site = site;
  }

  // Returns the bytes of the model's files, those of them that are stored, and those that the browser grants for more; null for
  // a browser that stores nothing.
  async size() {
    const files = this.#files();
    const store = await openStore();
    const lengths = Object.values((await store?.lengths(files)) ?? {});
    const sum = (values) => values.reduce((total, each) => total + each, 0);
    return {
      bytes: sum(Object.values(files).map(({ bytes }) => bytes)),
      stored: sum(lengths),
      granted: store ? await room() : null,
    };
  }

  // Loads the model; calls back with {loaded, total, fetched}. Returns a description of the backend.
  // runtime: one of site.json's, or by default the fastest.
  load(told, runtime) {
    this.#end();
    this.#worker = new Worker(new URL("worker.js", import.meta.url), { type: "module", name: "model" });
    return new Promise((resolve, reject) => {
      const failed = (problem) => {
        this.#end();
        reject(problem);
        for (const listener of this.#listeners.values()) listener({ problem });
      };
      this.#loading = { told, resolve, failed };
      this.#worker.onerror = (event) => {
        event.preventDefault?.();
        failed(new Problem(event.message || "the worker could not start", "reload the page"));
      };
      this.#worker.onmessage = ({ data }) => this.#heard(data);
      this.#worker.postMessage({ load: this.#site, runtime });
    });
  }

  // Ends a download; what has arrived stays in the store, and load() continues.
  pause() {
    this.#worker?.postMessage({ pause: true });
  }

  // Generates an answer; calls back with pieces. Returns figures. signal: an AbortSignal that stops it.
  answer(ask, options, control) {
    return this.#request({ ask, options }, control);
  }

  // Measures the speed; plan: {promptTokens or ids, newTokens, rounds}. Calls back with {round, of}.
  measure(plan, control) {
    return this.#request({ measure: plan }, control);
  }

  // Ends the model and frees its memory.
  close() {
    this.#end();
  }

  async #request(message, { told, signal }) {
    if (!this.#worker) throw new Problem("the model has stopped", "reload the page");
    const id = ++this.#count;
    return new Promise((resolve, reject) => {
      const stop = () => this.#worker?.postMessage({ stop: true });
      const end = (settle, value) => {
        signal.removeEventListener("abort", stop);
        this.#listeners.delete(id);
        settle(value);
      };
      signal.addEventListener("abort", stop);
      this.#listeners.set(id, (data) => {
        if (data.problem) end(reject, new Problem(data.problem.message, data.problem.hint));
        else if (data.done) end(resolve, data.done);
        else told(data);
      });
      this.#worker.postMessage({ ...message, id });
    });
  }

  // Removes the site's files from the browser.
  async remove() {
    await removeAll();
    const registration = await navigator.serviceWorker?.getRegistration();
    await registration?.unregister();
    const root = new URL("./", import.meta.url).pathname;
    for (const name of await caches.keys()) if (name.startsWith(`slm page ${root} `)) await caches.delete(name);
  }

  #heard(data) {
    if (data.loading) this.#loading.told(data.loading);
    else if (data.ready) this.#loading.resolve(data.ready);
    else if (data.id) this.#listeners.get(data.id)?.(data);
    else if (data.problem) this.#loading.failed(new Problem(data.problem.message, data.problem.hint));
  }

  // Ends the worker, which frees its memory.
  #end() {
    this.#worker?.terminate();
    this.#worker = null;
  }

  #files() {
    return filesOf(this.#site);
  }
}
