// Generates answers with the model in this browser, which runs in a worker.
import { Problem } from "./problem.js";
import { remove, stored } from "./store.js";

export class Local {
  #worker;
  #site;
  #listeners = new Map();
  #loading = null;
  #count = 0;

  constructor(site) {
    this.#site = site;
  }

  // Bytes to download, and whether all files are stored already.
  async size() {
    const files = this.#files();
    const bytes = Object.values(files).reduce((sum, file) => sum + file.bytes, 0);
    return { bytes, here: (await stored(files)).length === Object.keys(files).length };
  }

  // Loads the model; calls back with {loaded, total}. Returns a description of the backend.
  load(told) {
    this.#worker?.terminate();
    this.#worker = new Worker(new URL("worker.js", import.meta.url), { type: "module", name: "model" });
    return new Promise((resolve, reject) => {
      this.#loading = { told, resolve, reject };
      const failed = (problem) => {
        reject(problem);
        for (const listener of this.#listeners.values()) listener({ problem });
      };
      this.#worker.onerror = (event) => {
        event.preventDefault?.();
        failed(new Problem(event.message || "the worker could not start", "reload the page"));
      };
      this.#worker.onmessage = ({ data }) => this.#heard(data);
      this.#worker.postMessage({ load: this.#site });
    });
  }

  // Generates an answer; calls back with pieces. Returns figures. signal: an AbortSignal that stops it.
  answer(ask, options, { told, signal }) {
    const id = ++this.#count;
    return new Promise((resolve, reject) => {
      const stop = () => this.#worker.postMessage({ stop: true });
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
      this.#worker.postMessage({ ask, options, id });
    });
  }

  // Removes the site's files from the browser.
  async remove() {
    await remove();
    const registration = await navigator.serviceWorker?.getRegistration();
    await registration?.unregister();
    const root = new URL("./", import.meta.url).pathname;
    for (const name of await caches.keys()) if (name.startsWith(`slm page ${root} `)) await caches.delete(name);
  }

  #heard(data) {
    if (data.loading) this.#loading.told(data.loading);
    else if (data.ready) this.#loading.resolve(data.ready);
    else if (data.id) this.#listeners.get(data.id)?.(data);
    else if (data.problem) this.#loading.reject(new Problem(data.problem.message, data.problem.hint));
  }

  #files() {
    const large = Object.entries(this.#site.files).filter(([name]) => {
      return this.#site.model.files.includes(name) || name === this.#site.runtime.wasm.wasm;
    });
    return Object.fromEntries(large);
  }
}
