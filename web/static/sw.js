// Lets the page be opened without a network. A first line is written above this one when the site is: SITE, with its version and the
// hash of each small file; null where the page comes from `slm serve`, which removes whatever another site left here.
// The model's files are no matter of this one: store.js keeps them.
const ROOT = new URL("./", self.location.href);
const PAGES = `slm page ${ROOT.pathname} `;
const CURRENT = `${PAGES}${SITE?.version}`;
// With these a page may use threads, on hosts too that cannot be told to send them.
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
