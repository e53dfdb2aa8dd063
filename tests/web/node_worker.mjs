// A browser's Worker, made of Node's, for modules that start threads.
import { Worker as Thread } from "node:worker_threads";

const START = `
const { parentPort, workerData } = require("node:worker_threads");
globalThis.self = { postMessage: (data) => parentPort.postMessage(data) };
import(workerData).then(() => parentPort.on("message", (data) => self.onmessage({ data })));`;

globalThis.Worker = class {
  #thread;

  constructor(url) {
    this.#thread = new Thread(START, { eval: true, execArgv: [], workerData: String(url) });
    this.#thread.on("message", (data) => this.onmessage?.({ data }));
    this.#thread.on("error", ({ message }) => this.onerror?.({ message }));
  }

  postMessage(data) {
    this.#thread.postMessage(data);
  }

  terminate() {
    this.#thread.terminate();
  }
};
