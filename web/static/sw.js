// Serves the page offline. The site puts a line before this one: SITE, with its version and the hash of each small file, or null
// for the page of `slm serve`, which removes the service worker of another site at this address.
// store.js stores the model's files; this worker ignores them.
const ROOT = new URL("./", self.location.href);
const PAGES = `slm page ${ROOT.pathname} `;
const CURRENT = `${PAGES}${SITE?.version}`;
// These headers let a page use threads, also on hosts that cannot send them.
const ISOLATION = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};

self.addEventListener("install", (event) => event.waitUntil(SITE ? store() : self.skipWaiting()));
self.addEventListener("activate", (event) => event.waitUntil(SITE ? takeOver() : leave()));
self.addEventListener("message", (event) => event.data === "now" && self.skipWaiting());
self.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  if (!SITE || event.request.method !== "GET" || url.origin !== ROOT.origin) return;
  if (!url.pathname.startsWith(ROOT.pathname)) return;
  const name = url.pathname.slice(ROOT.pathname.length) || "index.html";
  if (name in SITE.files) event.respondWith(answer(name, event.request));
});

async function store() {
  const cache = await caches.open(CURRENT);
  const fetched = Object.entries(SITE.files).map(async ([name, integrity]) => {
    const response = await fetch(new URL(name, ROOT), { cache: "no-cache", integrity });
    if (!response.ok) throw new Error(`${name}: ${response.status}`);
    await cache.put(new URL(name, ROOT).href, response);
  });
  await Promise.all(fetched);
}

async function answer(name, request) {
  const cache = await caches.open(CURRENT);
  const found = (await cache.match(new URL(name, ROOT).href)) ?? (await fetch(request));
  const headers = new Headers(found.headers);
  for (const [header, value] of Object.entries(ISOLATION)) headers.set(header, value);
  return new Response(found.body, { status: found.status, statusText: found.statusText, headers });
}

async function takeOver() {
  for (const name of await caches.keys()) if (name.startsWith(PAGES) && name !== CURRENT) await caches.delete(name);
  await self.clients.claim();
}

async function leave() {
  for (const name of await caches.keys()) {
    if (name.startsWith(PAGES) || name === `slm files ${ROOT.pathname}`) await caches.delete(name);
  }
  await self.registration.unregister();
  for (const client of await self.clients.matchAll({ type: "window" })) client.navigate(client.url);
}
