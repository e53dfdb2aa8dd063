// A bundle's graph, run by onnxruntime-web with the caches of what it read; the contract is that of slm.core.contract.

const SIDES = ["key", "value"];
// Tokens read in one step: so often can reading be stopped, and attention's scores take so much memory at most.
export const PIECE = 128;
const BYTES = { float32: 4, float16: 2, int8: 1 };

const past = (layer, side) => `past_key_values.${layer}.${side}`;
const present = (layer, side) => `present.${layer}.${side}`;

export class Decoder {
  #ort;
  #session;
  #manifest;
  #outputs;
  #saved = null; // what was read up to the end of the last prompt

  constructor(ort, session, manifest) {
    this.#ort = ort;
    this.#session = session;
    this.#manifest = manifest;
    this.#outputs = ["logits", ...manifest.cache.flatMap(({ layer }) => SIDES.map((side) => present(layer, side)))];
    this.reset();
  }

  get context() {
    return this.#manifest.context;
  }

  // Bytes of the caches.
  get cacheBytes() {
    return Object.values(this.caches).reduce((sum, { dims, type }) => sum + dims.reduce((a, b) => a * b) * BYTES[type], 0);
  }

  // Forgets everything read.
  reset() {
    this.#saved = null;
    this.#forget();
    this.ids = [];
    this.caches = {};
    for (const cache of this.#manifest.cache) {
      for (const side of SIDES) this.caches[past(cache.layer, side)] = this.#empty(cache);
    }
  }

  // Goes back to where a text left the one that was read, as far as that is kept; returns how many of its tokens are read.
  resume(ids) {
    const begins = (read) => read.length < ids.length && read.every((id, i) => id === ids[i]);
    if (begins(this.ids)) return this.ids.length;
    if (this.#saved && begins(this.#saved.ids)) Object.assign(this, this.#saved);
    else this.reset();
    return this.ids.length;
  }

  // Keeps what was read so far to resume from. Tensors are never written to, so that nothing is copied; on a GPU they are
  // given back as soon as others take their place, and nothing is kept.
  keep() {
    const onHost = Object.values(this.caches).every((tensor) => tensor.location === "cpu");
    this.#saved = onHost ? { ids: this.ids, caches: this.caches } : null;
  }

  // Reads tokens in one step and returns the logits (V,) for the one that follows.
  async step(ids) {
    const length = this.ids.length + ids.length;
    const int64 = (values) => new this.#ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    const feeds = { ...this.caches, input_ids: int64(ids), attention_mask: int64(new Uint8Array(length).fill(1)) };
    const found = await this.#session.run(feeds, this.#outputs);
    const caches = {};
    for (const { layer } of this.#manifest.cache) {
      for (const side of SIDES) caches[past(layer, side)] = found[present(layer, side)];
    }
    this.#forget();
    this.caches = caches;
    this.ids = [...this.ids, ...ids];
    const { data, dims } = found.logits;
    return data.subarray(data.length - dims.at(-1)); // the last position's, should there be more
  }

  #forget() {
    for (const tensor of Object.values(this.caches ?? {})) if (tensor.location === "gpu-buffer") tensor.dispose();
  }

  // A sliding layer's cache has all of its positions from the beginning, others grow with the text.
  #empty({ kv_heads, head_dim, window, slack = 16, dtype = "float32" }) {
    const positions = this.#manifest.target === "fused" && window !== null ? window + slack : 0;
    const size = kv_heads * positions * head_dim;
    const data = { float32: () => new Float32Array(size), float16: () => halves(size), int8: () => new Int8Array(size) };
    return new this.#ort.Tensor(dtype, data[dtype](), [1, kv_heads, positions, head_dim]);
  }
}

// Where a browser has numbers of 16 bits onnxruntime-web wants those.
function halves(size) {
  return typeof Float16Array === "undefined" ? new Uint16Array(size) : new Float16Array(size);
}

// Has the graph give the logits of one position unless it is told otherwise, instead of all. onnxruntime-web can tell it nothing:
// it knows no inputs that have defaults. model: a ModelProto; the default is a tensor whose fields name (8) and raw_data (9) follow
// each other.
export function keepOneLogit(model) {
  const name = new TextEncoder().encode("num_logits_to_keep");
  const wanted = [0x42, name.length, ...name, 0x4a, 8, ...Array(8).fill(0)];
  for (let at = model.indexOf(wanted[0]); at >= 0; at = model.indexOf(wanted[0], at + 1)) {
    if (wanted.every((byte, i) => model[at + i] === byte)) {
      model[at + wanted.length - 8] = 1; // little-endian
      return true;
    }
  }
  return false;
}

// Where the caches are to stay on a GPU: what InferenceSession.create is told.
export function outputLocations(manifest, location) {
  return Object.fromEntries(manifest.cache.flatMap(({ layer }) => SIDES.map((side) => [present(layer, side), location])));
}
