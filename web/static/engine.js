// slm's own engine: runs a bundle for the CPU in WebAssembly (web/engine), reading its weights as they lie in the data file.
import { WASM_PAGE, layout } from "./engine-layout.js";
import { Problem, noMemory } from "./problem.js";
import { PIECE, Resumable } from "./resumable.js";

// Products in a step below which one thread is faster than several, which wait for each other a dozen times in each layer.
const FEW_PRODUCTS = 4e6;

export class Engine extends Resumable {
  #layout;
  #memory;
  #exports;
  #workers = [];
  #pages = 0; // pages of the global layers' caches
  #end; // the end of the memory in use
  #copy = null; // the address of the saved copy of the sliding layers' caches

  // plan: `engine` of site.json; dataBytes: size of the data file; threads: 1, or more in a page that may share memory.
  constructor(plan, dataBytes, threads = 1) {
    super();
    this.#layout = layout(plan, dataBytes, { threads, piece: PIECE });
    const { bytes, most } = this.#layout;
    const descriptor = { initial: bytes / WASM_PAGE, maximum: most / WASM_PAGE, shared: threads > 1 };
    try {
      this.#memory = new WebAssembly.Memory(descriptor);
    } catch {
      throw noMemory();
    }
    this.#end = bytes;
    this.threads = threads;
  }

  // The bytes for the data file, which must be there before `start`.
  get data() {
    const { at, bytes } = this.#layout.data;
    return this.#bytes(at, bytes);
  }

  // Starts the engine. module: the contents of the file that `engineFile` of simd.js names.
  async start(module) {
    const { at, contents, frequentIds, shape, stackBytes } = this.#layout;
    for (const [address, bytes] of contents) this.#bytes(address, bytes.length).set(bytes);
    if (frequentIds) this.#convert(frequentIds, shape.vocab);
    const compiled = await WebAssembly.compile(this.threads > 1 ? module : unshared(module));
    this.#exports = (await WebAssembly.instantiate(compiled, { env: { memory: this.#memory } })).exports;
    if (this.#layout.sizes.some((size, i) => size !== this.#exports.sizes(i))) {
      throw new Problem("the engine and the page are of different versions", "reload the page");
    }
    const started = Array.from({ length: this.threads - 1 }, (_, i) => {
      const stack = at.stacks + (i + 1) * stackBytes;
      return this.#startThread({ module: compiled, memory: this.#memory, model: at.model, thread: i + 1, stack });
    });
    try {
      await Promise.all(started);
    } catch {
      this.close(); // a browser that starts no more workers: one thread does everything
      this.threads = 1;
    }
    this.reset();
    return this;
  }

  get context() {
    return this.#layout.shape.context;
  }

  // Size of the caches in bytes.
  get cacheBytes() {
    const { rings, pageBytes } = this.#layout;
    return rings.bytes + this.#pages * pageBytes;
  }

  // Size of the memory in bytes: weights, activations and caches.
  get bytes() {
    return this.#memory.buffer.byteLength;
  }

  // Pages of caches stay for the next text.
  clear() {}

  // Copies the caches that later tokens overwrite, those of sliding layers.
  save() {
    const { at, bytes } = this.#layout.rings;
    this.#copy ??= this.#take(bytes);
    this.#bytes(this.#copy, bytes).set(this.#bytes(at, bytes));
    return true;
  }

  restore() {
    const { at, bytes } = this.#layout.rings;
    this.#bytes(at, bytes).set(this.#bytes(this.#copy, bytes));
  }

  // Reads tokens in one step and returns the logits (V,) of the next token, which are valid until the next step.
  async step(ids) {
    const { at, shape, products } = this.#layout;
    if (!ids.length || ids.length > PIECE || this.ids.length + ids.length > shape.context) {
      throw new Problem(`${ids.length} tokens after ${this.ids.length} are not a step`, "reload the page");
    }
    if (!ids.every((id) => Number.isInteger(id) && id >= 0 && id < shape.vocab)) {
      throw new Problem("a token is not in the model's vocabulary", "make the site again with slm web");
    }
    this.#grow(this.ids.length + ids.length);
    new Int32Array(this.#memory.buffer, at.tokens, ids.length).set(ids);
    this.#rotate(this.ids.length, ids.length);
    const threads = products * ids.length < FEW_PRODUCTS ? 1 : this.threads;
    this.#exports.step(at.model, this.ids.length, ids.length, threads);
    this.ids = [...this.ids, ...ids];
    return new Float32Array(this.#memory.buffer, at.logits, shape.vocab);
  }

  // Ends the threads. The engine cannot be used afterwards.
  close() {
    for (const worker of this.#workers) worker.terminate();
    this.#workers = [];
  }

  #bytes(at, length) {
    return new Uint8Array(this.#memory.buffer, at, length);
  }

  #startThread(task) {
    const worker = new Worker(new URL("./engine-thread.js", import.meta.url), { type: "module", name: "engine" });
    this.#workers.push(worker);
    return new Promise((resolve, reject) => {
      worker.onmessage = ({ data }) => (data.ready ? resolve() : reject(data));
      worker.onerror = (event) => {
        event.preventDefault?.();
        reject(event);
      };
      worker.postMessage(task);
    });
  }

  // Writes ids as 32-bit integers.
  #convert({ from, to, count }, vocab) {
    const words = new DataView(this.#memory.buffer, from, 8 * count);
    const ids = new Int32Array(this.#memory.buffer, to, count);
    for (let i = 0; i < count; i++) {
      const id = words.getBigInt64(8 * i, true);
      if (id < 0n || id >= BigInt(vocab)) {
        throw new Problem("a frequent token is not in the vocabulary", "export the bundle again");
      }
      ids[i] = Number(id);
    }
  }

  // Gives the global layers' caches room for a number of positions.
  #grow(positions) {
    const { at, cachePage, pageBytes } = this.#layout;
    for (; pageBytes && this.#pages * cachePage < positions; this.#pages++) {
      const address = this.#take(pageBytes); // replaces the buffer of a memory that is not shared
      new Uint32Array(this.#memory.buffer, at.pages + 4 * this.#pages, 1)[0] = address;
    }
  }

  // Returns the address of new memory.
  #take(bytes) {
    const address = this.#end;
    const missing = address + bytes - this.bytes;
    try {
      if (missing > 0) this.#memory.grow(Math.ceil(missing / WASM_PAGE));
    } catch {
      throw new Problem("there is not enough memory for a longer text", "close other tabs and apps, or start a new text");
    }
    this.#end = Math.ceil((address + bytes) / 64) * 64;
    return address;
  }

  // Writes cosines and sines of the positions of new tokens, as the graph computes them: in float32.
  #rotate(past, count) {
    const { rotations, shape, cosinesAt } = this.#layout;
    const half = shape.headDim / 2;
    const table = new Uint32Array(this.#memory.buffer, cosinesAt, 4);
    rotations.forEach((each, kind) => {
      if (!each) return;
      if (!each.frequencies) {
        table[kind] = each.cosines + 4 * past * half;
        table[2 + kind] = each.sines + 4 * past * half;
        return;
      }
      const array = (address, length) => new Float32Array(this.#memory.buffer, address, length);
      const frequencies = array(each.frequencies, half);
      const [cosines, sines] = [array(each.cosines, count * half), array(each.sines, count * half)];
      for (let t = 0; t < count; t++) {
        for (let i = 0; i < half; i++) {
          const angle = Math.fround((past + t) * frequencies[i]);
          cosines[t * half + i] = Math.cos(angle);
          sines[t * half + i] = Math.sin(angle);
        }
      }
    });
  }
}

// Returns the module for one thread: its import of the memory, "env" "memory", is declared as shared (3) with a maximum.
function unshared(module) {
  const wanted = [3, ...new TextEncoder().encode("env"), 6, ...new TextEncoder().encode("memory"), 2, 3];
  const bytes = module.slice();
  for (let at = bytes.indexOf(3); at >= 0; at = bytes.indexOf(3, at + 1)) {
    if (!wanted.every((byte, i) => bytes[at + i] === byte)) continue;
    bytes[at + wanted.length - 1] = 1;
    return bytes;
  }
  throw new Problem("the engine's module imports no memory", "make the site again with slm web");
}
