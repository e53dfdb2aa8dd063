// Loads large files into memory, from the browser's store or from the site, and stores what comes from the site. Bytes go from
// the network into their place as they arrive: there is one copy of a file in memory.
import { download, reading } from "./download.js";
import { sha256 } from "./hash.js";
import { STORE, openStore, room } from "./kept.js";
import { Problem } from "./problem.js";

// Bytes of a file that are stored together. Those that are not stored yet are lost if the tab is closed.
export const PART = 4 << 20;

// Returns the contents of files after a check of their hashes: {contents: {name: Uint8Array}, kept: whether all are stored}.
// files: {name: {bytes, sha256}}. told is called with {file, loaded, total, fetched, full}: bytes that are there, of all, from the
// network, and whether the browser has no room to store them; or with {waiting: file} while another tab loads it. place(name, bytes) may return the array to write a file into, also on shared memory.
// signal: an AbortSignal; what has arrived stays in the store.
export async function fetchAll(files, told = () => {}, place = () => null, { signal } = {}) {
  const store = await openStore();
  const total = sum(Object.values(files).map(({ bytes }) => bytes));
  const here = sum(Object.values((await store?.lengths(files)) ?? {}));
  const contents = {};
  let [done, fetched, full] = [0, 0, store !== null && (await room()) < total - here];
  for (const [name, file] of Object.entries(files)) {
    const content = place(name, file.bytes) ?? new Uint8Array(file.bytes);
    if (content.length !== file.bytes) throw new Error(`the place for ${name} has another size`);
    const arrival = new Arrival(file, content, full ? null : store, await sha256(), (at, more) => {
      fetched += more;
      full ||= arrival?.full ?? false;
      told({ file: name, loaded: done + at, total, fetched, full });
    });
    await alone(file.sha256, () => told({ waiting: name }), signal, () => load(name, file, arrival, store, signal));
    contents[name] = content;
    done += file.bytes;
  }
  told({ loaded: total, total, fetched, full });
  const lengths = (await store?.lengths(files)) ?? {};
  return { contents, kept: Object.entries(files).every(([name, { bytes }]) => lengths[name] === bytes) };
}

// Removes files that no longer belong to the site.
export async function forget(files) {
  await (await openStore())?.forget(files);
}

// Loads one file; what is stored and turns out to be altered is fetched again.
async function load(name, { bytes, sha256: wanted }, arrival, store, signal) {
  const fetchRest = async () => {
    try {
      await download(name, bytes, arrival, { signal, stored: arrival.keeps });
    } finally {
      await arrival.flush();
    }
    return arrival.digest() === wanted;
  };
  for (const part of (await store?.parts({ bytes, sha256: wanted })) ?? []) {
    signal?.throwIfAborted();
    if (!(await arrival.read(await store.get(part), part))) break;
  }
  const stored = arrival.at;
  if (stored === bytes && arrival.digest() === wanted) return;
  if (stored < bytes && (await fetchRest())) return;
  await store?.remove(wanted);
  arrival.restart(0);
  if (stored > 0 && (await fetchRest())) return;
  await store?.remove(wanted);
  throw new Problem(`${name} was altered (SHA-256 differs)`, "the site has changed or is not whole: reload the page");
}

// A file on its way into memory and into the store.
class Arrival {
  at = 0; // bytes in their place
  full = false; // whether the browser had no room for them
  #stored = 0; // bytes in the store
  #storing = Promise.resolve();
  #content;
  #file;
  #hash;
  #store;
  #told;

  // store: null if the file is not to be stored; told: called with the bytes in their place and those new from the network.
  constructor(file, content, store, hash, told) {
    [this.#file, this.#content, this.#store, this.#hash, this.#told] = [file, content, store, hash, told];
    hash.init();
  }

  get keeps() {
    return this.#store !== null;
  }

  // Begins again; the first `stored` bytes are in the store.
  restart(stored = this.#stored) {
    this.at = 0;
    this.#stored = stored;
    this.#hash.init();
  }

  // Reads a part from the store; returns whether it was complete.
  async read(response, { end }) {
    const read = response?.body ? reading(response.body) : async () => null;
    for (;;) {
      const { done, value } = (await read().catch(() => null)) ?? { done: true };
      if (done || this.at + value.length > end) break;
      this.#add(value, 0);
    }
    this.#stored = this.at;
    return this.at === end;
  }

  // Adds bytes from the network.
  async push(bytes) {
    this.#add(bytes, bytes.length);
    if (this.at - this.#stored >= PART) await this.#keep();
  }

  // Stores the last part.
  async flush() {
    await this.#keep();
    await this.#storing;
  }

  digest() {
    return this.#hash.digest();
  }

  #add(bytes, fetched) {
    this.#content.set(bytes, this.at);
    this.#hash.update(bytes);
    this.at += bytes.length;
    this.#told(this.at, fetched);
  }

  // Stores what has arrived since the last part, while the next bytes arrive.
  async #keep() {
    await this.#storing;
    if (!this.#store || this.at <= this.#stored) return;
    const start = this.#stored;
    this.#stored = this.at;
    this.#storing = this.#store.put(this.#file.sha256, start, unshared(this.#content.subarray(start, this.at))).catch(async () => {
      const store = this.#store; // the quota is exceeded: the file works, but not offline
      [this.#store, this.full] = [null, true];
      await store?.remove(this.#file.sha256).catch(() => {});
    });
  }
}

// Returns a copy of bytes for a response, which takes no shared memory and copies them once more: so one buffer serves them all,
// and no garbage waits for its collection.
let buffer = new Uint8Array(0);
function unshared(bytes) {
  if (bytes.length > buffer.length) buffer = new Uint8Array(bytes.length);
  buffer.set(bytes);
  return buffer.subarray(0, bytes.length);
}

// Runs an action while no other tab runs it for the same file, which would fetch it twice.
async function alone(sha256, waits, signal, action) {
  if (!globalThis.navigator?.locks) return action();
  const name = `${STORE} ${sha256}`;
  const found = await navigator.locks.request(name, { ifAvailable: true }, async (lock) => (lock ? { done: await action() } : null));
  if (found) return found.done;
  waits();
  return navigator.locks.request(name, signal ? { signal } : {}, action);
}

const sum = (values) => values.reduce((total, each) => total + each, 0);
