// Returns the file of slm's engine for this browser: with relaxed SIMD instructions, or with the older ones.
export function engineFile() {
  // A module whose only function uses i16x8.relaxed_dot_i8x16_i7x16_s.
  const head = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 15, 1, 13, 0];
  const probe = Uint8Array.from([...head, 65, 1, 253, 15, 65, 2, 253, 15, 253, 146, 2, 11]);
  return WebAssembly.validate(probe) ? "engine/relaxed.wasm" : "engine/simd.wasm";
}

// Returns the files that a site's model takes, besides the page: the model's, and the WebAssembly that runs it.
// runtime: "engine", "wasm" or "webgpu".
export function filesOf(site, runtime = site.engine ? "engine" : "wasm") {
  const program = runtime === "engine" ? engineFile() : site.runtime[runtime].wasm;
  return Object.fromEntries([program, ...site.model.files].map((name) => [name, site.files[name]]));
}
