// Stores large files in the browser under their hashes: each is downloaded once and works offline.
import { Problem } from "./problem.js";

const ROOT = new URL("./", import.meta.url);
// Sites in other directories of the same host have their own stores.
export const STORE = `slm files ${ROOT.pathname}`;
const key = (sha256) => new URL(`stored/${sha256}`, ROOT).href;
// Pages that come over plain HTTP from another machine have neither caches nor hashes.
const checks = globalThis.crypto?.subtle !== undefined;
const open = () => (globalThis.caches ? caches.open(STORE) : null);

// Returns which files are stored, by name. files: {name: {bytes, sha256}}.
export async function stored(files) {
  const store = await open();
  const found = [];
  for (const [name, { sha256 }] of Object.entries(files)) if (await store?.match(key(sha256))) found.push(name);
  return found;
}

// Returns the contents of files, from the store or the site, after a check of their hashes; calls back with each part.
// Result: {contents: {name: Uint8Array}, kept: whether all of them are available offline}.
export async function fetchAll(files, told) {
  const store = await open();
  const total = Object.values(files).reduce((sum, file) => sum + file.bytes, 0);
  const contents = {};
  let [done, kept] = [0, store !== null];
  for (const [name, file] of Object.entries(files)) {
    const part = (bytes) => told({ file: name, loaded: done + bytes, total });
    part(0);
    const response = await store?.match(key(file.sha256));
    const content = await read(name, file, response ?? (await ask(name)), part);
    await check(name, file, content, response ? store : null);
    if (!response && store) kept &&= await keep(store, file, content);
    contents[name] = content;
    done += file.bytes;
  }
  told({ loaded: total, total });
  return { contents, kept };
}

// Removes the store of this site.
export async function remove() {
  await globalThis.caches?.delete(STORE);
}

// Removes files that no longer belong to the site.
export async function forget(files) {
  const wanted = new Set(Object.values(files).map((file) => key(file.sha256)));
  const store = await open();
  for (const request of (await store?.keys()) ?? []) if (!wanted.has(request.url)) await store.delete(request);
}

async function ask(name) {
  let response;
  try {
    response = await fetch(new URL(name, ROOT), { cache: "no-cache" });
  } catch {
    throw new Problem(`${name} could not be fetched`, "the site cannot be reached; try again later");
  }
  if (!response.ok) throw new Problem(`${name} could not be fetched (${response.status})`, "the site is not complete");
  return response;
}

async function read(name, { bytes }, response, told) {
  const content = new Uint8Array(bytes);
  const reader = response.body.getReader();
  let length = 0;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      if (length + value.length <= bytes) content.set(value, length);
      length += value.length;
      told(Math.min(length, bytes));
    }
  } catch {
    throw new Problem(`${name} broke off after ${length.toLocaleString()} bytes`, "check the network and try again");
  }
  if (length !== bytes) {
    const sizes = `${length.toLocaleString()} bytes instead of ${bytes.toLocaleString()}`;
    throw new Problem(`${name} has ${sizes}`, "the site has changed or is not complete: reload the page");
  }
  return content;
}

async function check(name, { sha256 }, content, store) {
  if (!checks) return;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  if ([...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("") === sha256) return;
  await store?.delete(key(sha256)); // the next use downloads it again
  throw new Problem(`${name} was altered (SHA-256 differs)`, "the site has changed or is not whole: reload the page");
}

async function keep(store, { sha256 }, content) {
  try {
    await store.put(key(sha256), new Response(content));
    return true;
  } catch {
    return false; // the quota is exceeded: the file works, but not offline
  }
}
