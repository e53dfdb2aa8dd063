// The files that this browser stores for the site, in parts under their hashes. A cache replaces an entry completely or not at
// all and two tabs may write the same one, so a file that arrives becomes one entry for each part: what a visit has received
// stays for the next.

const ROOT = new URL("./", import.meta.url);
const FOLDER = new URL("stored/", ROOT).href;
// Sites in other directories of the same host have their own stores.
export const STORE = `slm files ${ROOT.pathname}`;

// Returns the store; null where the browser has none, as on pages from another machine over plain HTTP.
export async function openStore() {
  try {
    return globalThis.caches ? new Store(await caches.open(STORE)) : null;
  } catch {
    return null; // the person has forbidden storage
  }
}

export class Store {
  #cache;

  constructor(cache) {
    this.#cache = cache;
  }

  // Returns the parts from a file's beginning, without gaps: [{start, end, url}].
  async parts({ bytes, sha256 }) {
    return chain(bytes, (await this.#entries()).get(sha256) ?? []);
  }

  // Returns the bytes that are stored from each file's beginning, by name. files: {name: {bytes, sha256}}.
  async lengths(files) {
    const entries = await this.#entries();
    const length = ({ bytes, sha256 }) => chain(bytes, entries.get(sha256) ?? []).at(-1)?.end ?? 0;
    return Object.fromEntries(Object.entries(files).map(([name, file]) => [name, length(file)]));
  }

  // Returns the response with a part, or undefined if another tab has removed it.
  get({ url }) {
    return this.#cache.match(url);
  }

  // Stores a part of a file.
  put(sha256, start, content) {
    const url = `${FOLDER}${sha256}/${start}-${start + content.length}`;
    return this.#cache.put(url, new Response(content));
  }

  // Removes the files with these hashes.
  async remove(sha256) {
    await this.#removeIf((found) => found === sha256);
  }

  // Removes the files that do not belong to the site, those of an older site and of older versions of this page.
  async forget(files) {
    const wanted = new Set(Object.values(files).map(({ sha256 }) => sha256));
    await this.#removeIf((found) => !wanted.has(found));
  }

  async #removeIf(condition) {
    for (const [sha256, entries] of await this.#entries()) {
      if (condition(sha256)) for (const { url } of entries) await this.#cache.delete(url);
    }
  }

  // Returns the parts by hash. Older versions stored a whole file in one entry, without a range.
  async #entries() {
    const found = new Map();
    for (const { url } of await this.#cache.keys()) {
      const [, sha256, start = 0, end = Infinity] = /^([^/]*)(?:\/(\d+)-(\d+))?$/.exec(url.slice(FOLDER.length)) ?? [];
      if (!found.has(sha256)) found.set(sha256, []);
      found.get(sha256).push({ start: Number(start), end: Number(end), url });
    }
    return found;
  }
}

// Returns the entries that cover a file from its beginning, the longest first where several begin at the same byte.
function chain(bytes, entries) {
  const found = [];
  for (let at = 0; at < bytes; at = found.at(-1).end) {
    const next = entries.filter(({ start }) => start === at).map((entry) => ({ ...entry, end: Math.min(entry.end, bytes) }));
    if (!next.length) break;
    found.push(next.reduce((a, b) => (b.end > a.end ? b : a)));
    if (found.at(-1).end <= at) return found.slice(0, -1);
  }
  return found;
}

// Returns the bytes that the browser still grants this site; Infinity if it does not say.
export async function room() {
  const { quota, usage } = (await navigator.storage?.estimate?.().catch(() => null)) ?? {};
  return quota === undefined ? Infinity : Math.max(0, quota - (usage ?? 0));
}

// Removes everything that is stored for this site.
export async function removeAll() {
  await globalThis.caches?.delete(STORE);
}
