// Runs a bundle's graph with onnxruntime-web, with its caches; the contract is slm.core.contract.
import { Resumable } from "./resumable.js";

const SIDES = ["key", "value"];
const BYTES = { float32: 4, float16: 2, int8: 1 };

const past = (layer, side) => `past_key_values.${layer}.${side}`;
const present = (layer, side) => `present.${layer}.${side}`;

export class Decoder extends Resumable {
  #ort;
  #session;
  #manifest;
  #outputs;
  #saved = null; // the caches after the last prompt

  constructor(ort, session, manifest) {
    super();
    this.#ort = ort;
    this.#session = session;
    this.#manifest = manifest;
    this.#outputs = ["logits", ...manifest.cache.flatMap(({ layer }) => SIDES.map((side) => present(layer, side)))];
    this.reset();
  }

  get context() {
    return this.#manifest.context;
  }

  // Size of the caches in bytes.
  get cacheBytes() {
    return Object.values(this.caches).reduce((sum, { dims, type }) => sum + dims.reduce((a, b) => a * b) * BYTES[type], 0);
  }

  clear() {
    this.#saved = null;
    this.#forget();
    this.caches = {};
    for (const cache of this.#manifest.cache) {
      for (const side of SIDES) this.caches[past(cache.layer, side)] = this.#empty(cache);
    }
  }

  // Tensors are never modified, so nothing is copied. On a GPU, old tensors are disposed when new ones replace them, and nothing is
  // saved.
  save() {
    this.#saved = this.caches;
    return Object.values(this.caches).every((tensor) => tensor.location === "cpu");
  }

  restore() {
    this.caches = this.#saved;
  }

  // Reads tokens in one step and returns the logits (V,) of the next token.
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
    return data.subarray(data.length - dims.at(-1)); // the logits of the last position, if there are several
  }

  #forget() {
    for (const tensor of Object.values(this.caches ?? {})) if (tensor.location === "gpu-buffer") tensor.dispose();
  }

  // A sliding layer's cache has all its positions from the start; other caches grow with the text.
  #empty({ kv_heads, head_dim, window, slack = 16, dtype = "float32" }) {
    const positions = this.#manifest.target === "fused" && window !== null ? window + slack : 0;
    const size = kv_heads * positions * head_dim;
    const data = { float32: () => new Float32Array(size), float16: () => halves(size), int8: () => new Int8Array(size) };
    return new this.#ort.Tensor(dtype, data[dtype](), [1, kv_heads, positions, head_dim]);
  }
}

// onnxruntime-web requires the browser's 16-bit array type where it exists.
function halves(size) {
  return typeof Float16Array === "undefined" ? new Uint16Array(size) : new Float16Array(size);
}

// Makes the graph compute the logits of one position by default instead of all: onnxruntime-web does not support inputs with
// defaults, so it cannot set the number itself. model: a ModelProto; the default is a tensor whose fields name (8) and
// raw_data (9) are adjacent.
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

// Options of InferenceSession.create that keep the caches on a GPU.
export function outputLocations(manifest, location) {
  return Object.fromEntries(manifest.cache.flatMap(({ layer }) => SIDES.map((side) => [present(layer, side), location])));
}
