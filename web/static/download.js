// Reads a file of the site from a byte on, and continues by itself after an interruption.
import { Problem } from "./problem.js";

const ROOT = new URL("./", import.meta.url);
// A response without any byte for so long is given up and asked for again, in milliseconds.
const STALLED_MS = 30_000;
// Bytes that are read at once, where the browser reads into a buffer.
const READ = 1 << 18;
// Waits before the next attempts, in milliseconds; any progress starts this list again.
const WAITS_MS = [500, 1000, 2000, 4000];

// Reads a file of `bytes` bytes into an arrival, which has `at`, the bytes that are there; push(part); and restart(), for a
// server that sends a file only from its beginning. stored: whether the page stores the file itself.
export async function download(name, bytes, arrival, { signal, stored, waits = WAITS_MS, stalled = STALLED_MS }) {
  let [most, failures] = [arrival.at, 0];
  while (arrival.at < bytes) {
    const began = arrival.at;
    try {
      await attempt(name, bytes, arrival, { signal, stored, stalled });
    } catch (error) {
      if (signal?.aborted || error instanceof Problem) throw error;
      if (arrival.at === 0 && began === 0 && most === 0) {
        throw new Problem(`${name} could not be fetched`, "the site cannot be reached; try again later");
      }
      failures = arrival.at > most ? 0 : failures + 1;
      most = Math.max(most, arrival.at);
      if (failures >= waits.length) {
        throw new Problem(`${name} broke off after ${most.toLocaleString("en")} bytes`, "check the network, then continue");
      }
      await wait(waits[failures], signal);
    }
  }
}

async function attempt(name, bytes, arrival, { signal, stored, stalled }) {
  const control = new AbortController();
  const abort = () => control.abort(signal.reason);
  signal?.throwIfAborted();
  signal?.addEventListener("abort", abort);
  let timer = setTimeout(() => control.abort(), stalled);
  try {
    const response = await ask(name, bytes, arrival, { signal: control.signal, stored });
    const read = reading(response.body);
    for (;;) {
      const { done, value } = await read();
      if (done) break;
      clearTimeout(timer);
      timer = setTimeout(() => control.abort(), stalled);
      if (arrival.at + value.length > bytes) {
        control.abort();
        throw new Problem(`${name} has more than ${bytes.toLocaleString("en")} bytes`, CHANGED);
      }
      await arrival.push(value);
    }
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", abort);
  }
  if (arrival.at < bytes) throw new Problem(`${name} has ${sizes(arrival.at, bytes)}`, CHANGED);
}

// Returns a function that reads a stream: into one buffer where the browser can, so that no garbage waits for its collection. What it
// returns holds until the next call.
export function reading(stream) {
  try {
    const reader = stream.getReader({ mode: "byob" });
    let buffer = new ArrayBuffer(READ);
    return async () => {
      const { done, value } = await reader.read(new Uint8Array(buffer, 0, READ));
      if (value) buffer = value.buffer;
      return { done, value };
    };
  } catch {
    const reader = stream.getReader();
    return () => reader.read();
  }
}

// Returns a response whose first byte is the next one that the arrival wants.
async function ask(name, bytes, arrival, { signal, stored }) {
  const url = new URL(name, ROOT);
  // What the page stores need not be in the browser's HTTP cache as well.
  const whole = { cache: stored ? "no-store" : "no-cache", signal };
  let response = null;
  if (arrival.at > 0) {
    response = await fetch(url, { ...whole, cache: "no-store", headers: { Range: `bytes=${arrival.at}-` } });
    if (response.status === 206) {
      const [, start, size] = /^bytes (\d+)-\d+\/(\d+|\*)$/.exec(response.headers.get("Content-Range") ?? "") ?? [];
      if (Number(start) === arrival.at && (size === "*" || Number(size) === bytes)) return response;
    }
    if (response.status === 206 || response.status === 416) {
      await response.body?.cancel();
      response = null; // the file on the server is another one, or the server has a fault
    }
  }
  response ??= await fetch(url, whole);
  if (response.ok) {
    if (arrival.at > 0) arrival.restart();
    return response;
  }
  await response.body?.cancel();
  if (arrival.at > 0 && (response.status === 429 || response.status >= 500)) throw new Error(`${response.status}`);
  throw new Problem(`${name} could not be fetched (${response.status})`, "the site is not complete");
}

const CHANGED = "the site has changed or is not complete: reload the page";
const sizes = (found, wanted) => `${found.toLocaleString("en")} bytes instead of ${wanted.toLocaleString("en")}`;

function wait(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    signal?.addEventListener("abort", stop, { once: true });
  });
}
