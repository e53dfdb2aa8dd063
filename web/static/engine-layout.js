// The engine's memory: the data file, the table that describes the model (web/engine/engine.h), activations and caches.
// Every address that the engine gets is computed here, after a check against the sizes of the file and of the model.
import { Problem } from "./problem.js";

export const WASM_PAGE = 65536;
const MOST_BYTES = 65536 * WASM_PAGE;
const STACK = 65536; // of each thread; that of the first begins at address 0
const CACHE_PAGE = 256; // positions of a page of the global layers' caches
const TILE = 16; // as in engine.h
const TEAM = 28; // bytes of the state of the threads
const KINDS = { float: 0, bytes: 1, nibbles: 2, columns: 3 };
const MOST_INPUTS = 65536; // of products of integers without blocks, whose sums have 32 bits
const ACTIVATIONS = ["gelu_pytorch_tanh", "gelu", "silu", "relu"];
const BLOCKS = [16, 32, 64, 128, 256];
const TABLE = "model.embed_tokens";
const ROTATIONS = ["sliding_attention", "full_attention"];
const NO_PRODUCT = { words: [0, 0, 0, 0, 0, 0, 0], stride: 0, blocks: 0 };

const wrong = (what) => new Problem(`the site's plan of the model is wrong: ${what}`, "make the site again with slm web");

// Returns where everything lies. plan: `engine` of site.json; dataBytes: size of the data file; piece: most tokens of a step.
export function layout(plan, dataBytes, { threads, piece }) {
  const shape = checked(plan.shape);
  if (plan.tensors === null || typeof plan.tensors !== "object") throw wrong("it has no tensors");
  const dataAt = STACK;
  let end = dataAt + dataBytes;
  const take = (bytes, align = 64) => {
    const at = Math.ceil(end / align) * align;
    end = at + bytes;
    return at;
  };
  const contents = []; // [address, bytes] of what is written before the first step

  // The address of a tensor of a number of bytes.
  const tensor = (name, bytes) => {
    const place = plan.tensors[name];
    if (typeof place === "string") {
      const raw = decoded(name, place);
      if (raw.length !== bytes) throw wrong(`${name} has ${raw.length} bytes instead of ${bytes}`);
      const at = take(bytes);
      contents.push([at, raw]);
      return at;
    }
    if (!Array.isArray(place) || !place.every((number) => Number.isSafeInteger(number) && number >= 0)) {
      throw wrong(`${name} has no place`);
    }
    const [offset, size] = place;
    if (size !== bytes) throw wrong(`${name} has ${size} bytes instead of ${bytes}`);
    if (offset + size > dataBytes) throw wrong(`${name} is not inside the data file`);
    return dataAt + offset;
  };

  // The words of `struct product`, and what its rounded activations take.
  const weights = (path, rows, inputs, { bits, block, points, dynamic }, parts = "weight_quantized") => {
    if (!bits) {
      const words = [KINDS.float, rows, inputs, inputs, tensor(`${path}.weight`, 4 * rows * inputs), 0, 0];
      return { words, stride: 0, blocks: 0 };
    }
    const quantized = tensor(`${path}.${parts}`, (rows * inputs * bits) / 8);
    const blocks = inputs / block;
    const scales = tensor(`${path}.${parts.startsWith("frequent") ? "frequent" : "weight"}_scale`, 4 * rows * blocks);
    const zero = points ? tensor(`${path}.weight_zero_points`, rows * Math.ceil(blocks / 2)) : 0;
    const kind = dynamic ? KINDS.columns : bits === 8 ? KINDS.bytes : KINDS.nibbles;
    const stride = inputs * (bits === 4 && block < 32 ? 2 : 1); // kernels for 4 bits read 32 integers at a time
    return { words: [kind, rows, inputs, block, quantized, scales, zero], stride, blocks };
  };
  const schemes = new Map(); // checked products, by path
  const scheme = (path, inputs) => {
    if (!schemes.has(path)) schemes.set(path, schemeOf(path, plan.products?.[path], inputs));
    return schemes.get(path);
  };
  const floats = (name, count) => tensor(name, 4 * count);
  const { hidden, heads, kvHeads, headDim, inner, vocab, context, windows } = shape;
  const small = shape.cache === "int8";
  const capacity = shape.window ? Math.min(context, shape.window + piece) : 0;
  const used = []; // all products
  const product = (path, rows, inputs) => {
    const made = weights(path, rows, inputs, scheme(path, inputs));
    used.push(made);
    return made;
  };

  // Caches. Those of sliding layers lie together, to be copied at once.
  const cacheBytes = kvHeads * headDim * (small ? 1 : 4);
  const sliding = windows.filter((window) => window !== null).length;
  const ringBytes = sliding * 2 * capacity * cacheBytes;
  const pageBytes = (windows.length - sliding) * 2 * CACHE_PAGE * cacheBytes;
  const mostPages = pageBytes ? Math.ceil(context / CACHE_PAGE) : 0;
  const rings = take(ringBytes);
  let [slidingSoFar, globalSoFar] = [0, 0];
  const cacheOf = (window) => {
    if (window === null) return 2 * CACHE_PAGE * cacheBytes * globalSoFar++;
    return rings + 2 * capacity * cacheBytes * slidingSoFar++;
  };

  const joint = (heads + 2 * kvHeads) * headDim;
  const layers = windows.flatMap((window, i) => {
    const path = `model.layers.${i}`;
    const keys = cacheOf(window);
    const values = keys + (window === null ? CACHE_PAGE : capacity) * cacheBytes;
    const scale = (side) => (small ? floats(`${path}.self_attn.${side}_scale`, kvHeads * headDim) : 0);
    return [
      ...[window ?? 0, window === null ? 1 : 0, keys, values, scale("k"), scale("v")],
      floats(`${path}.input_layernorm.weight`, hidden),
      floats(`${path}.self_attn.q_norm.weight`, headDim),
      floats(`${path}.self_attn.k_norm.weight`, headDim),
      floats(`${path}.post_attention_layernorm.weight`, hidden),
      floats(`${path}.pre_feedforward_layernorm.weight`, hidden),
      floats(`${path}.post_feedforward_layernorm.weight`, hidden),
      ...product(`${path}.self_attn.qkv_proj`, joint, hidden).words,
      ...product(`${path}.self_attn.o_proj`, hidden, heads * headDim).words,
      ...product(`${path}.mlp.gate_up_proj`, 2 * inner, hidden).words,
      ...product(`${path}.mlp.down_proj`, hidden, inner).words,
    ];
  });

  const of = scheme(TABLE, hidden);
  if (of.frequent > vocab) throw wrong(`${TABLE} has ${of.frequent} frequent rows`);
  let [embedding, lower, frequents, frequentIds, shift] = [null, NO_PRODUCT, NO_PRODUCT, null, 0];
  if (of.halves) {
    embedding = weights(TABLE, vocab, hidden, of, "weight_upper");
    lower = weights(TABLE, vocab, hidden, of, "weight_lower");
    shift = floats(`${TABLE}.weight_shift`, vocab);
  } else embedding = weights(TABLE, vocab, hidden, of);
  used.push(embedding);
  if (of.frequent) {
    frequents = weights(TABLE, of.frequent, hidden, { bits: 8, block: of.block }, "frequent_quantized");
    used.push(frequents);
    frequentIds = { from: tensor(`${TABLE}.frequent_ids`, 8 * of.frequent), to: take(4 * of.frequent), count: of.frequent };
  }
  const head = shape.tied ? embedding : product("lm_head", vocab, hidden);
  if (head !== embedding && (of.halves || of.frequent)) throw wrong("a head of its own beside a table of another kind");
  const norm = floats("model.norm.weight", hidden);

  // Rotations: frequencies, from which the angles of each step follow, or the tables of earlier versions.
  const half = headDim / 2;
  const rotations = ROTATIONS.map((name) => {
    if (!windows.some((window) => (window === null) === (name === "full_attention"))) return null;
    if (`positions.${name}_inv_freq` in plan.tensors) {
      const frequencies = floats(`positions.${name}_inv_freq`, half);
      return { frequencies, cosines: take(4 * piece * half), sines: take(4 * piece * half) };
    }
    const [cosines, sines] = ["cos", "sin"].map((part) => floats(`positions.${name}_${part}`, context * half));
    return { frequencies: null, cosines, sines };
  });

  const stride = Math.max(8, ...used.map((each) => each.stride));
  const mostBlocks = Math.max(1, ...used.map((each) => each.blocks));
  const longest = Math.ceil((context + 4) / 4) * 4;
  const at = {
    layers: take(4 * layers.length),
    pages: take(4 * Math.max(1, mostPages)),
    tokens: take(4 * piece),
    x: take(4 * piece * hidden),
    y: take(4 * piece * hidden),
    wide: take(4 * piece * Math.max(joint, 2 * inner)),
    attended: take(4 * piece * Math.max(heads * headDim, inner)),
    scores: take(4 * threads * 4 * longest),
    tile: take(4 * threads * TILE * headDim),
    logits: take(4 * vocab),
    chosen: take(4 * (vocab + 1)),
    rounded: take(2 * piece * stride),
    scales: take(4 * piece * mostBlocks),
    sums: take(4 * piece * mostBlocks),
    team: take(TEAM),
    stacks: take((threads - 1) * STACK),
  };
  const rotation = (part) => rotations.map((each) => each?.[part] ?? 0);
  const beforeRotations = [
    ...[hidden, windows.length, heads, kvHeads, headDim, inner, vocab, ACTIVATIONS.indexOf(shape.activation), capacity],
    ...[CACHE_PAGE, Number(small), of.halves ? shape.candidates : 0, of.frequent, stride, mostBlocks, longest],
    ...[shape.epsilon, shape.scale, shape.embeddingScale].map(float),
    ...[at.layers, ...embedding.words, ...lower.words, ...frequents.words, ...head.words],
    ...[norm, frequentIds?.to ?? 0, shift, at.pages, at.tokens],
  ];
  const model = [
    ...[...beforeRotations, ...rotation("cosines"), ...rotation("sines")],
    ...[at.x, at.y, at.wide, at.attended, at.scores, at.tile, at.logits, at.chosen],
    ...[at.rounded, at.rounded, at.scales, at.sums, at.team],
  ];
  at.model = take(4 * model.length);
  contents.push([at.model, bytesOf(model)], [at.layers, bytesOf(layers)]);
  const bytes = Math.ceil(end / WASM_PAGE) * WASM_PAGE;
  const most = bytes + Math.ceil((mostPages * pageBytes + ringBytes) / WASM_PAGE + mostPages + 1) * WASM_PAGE;
  if (most > MOST_BYTES) {
    throw new Problem("the model is too large for a browser, which has 4 GB", "export it with a shorter --context");
  }
  return {
    ...{ shape, data: { at: dataAt, bytes: dataBytes }, contents, frequentIds, rotations, at, bytes, most },
    ...{ rings: { at: rings, bytes: ringBytes }, pageBytes, cachePage: CACHE_PAGE, stackBytes: STACK },
    sizes: [4 * model.length, (4 * layers.length) / windows.length, TEAM], // of the structures, as in engine.h and team.c
    cosinesAt: at.model + 4 * beforeRotations.length,
    products: used.reduce((sum, { words }) => sum + words[1] * words[2], 0),
  };
}

// Returns the model's shape with `window`, the common window of its sliding layers (0 if it has none).
function checked(shape) {
  const sizes = ["vocab", "hidden", "heads", "kvHeads", "headDim", "inner", "context"];
  for (const name of sizes) if (!isSize(shape?.[name])) throw wrong(`${name} is ${shape?.[name]}`);
  for (const name of ["hidden", "inner", "headDim"]) if (shape[name] % 8) throw wrong(`${name} is no multiple of 8`);
  if (shape.heads % shape.kvHeads) throw wrong("heads are no multiple of kvHeads");
  for (const name of ["epsilon", "scale", "embeddingScale"]) if (!(shape[name] > 0)) throw wrong(`${name} is ${shape[name]}`);
  if (!ACTIVATIONS.includes(shape.activation)) throw wrong(`activation ${shape.activation}`);
  if (!["float32", "int8"].includes(shape.cache)) throw wrong(`cache ${shape.cache}`);
  const { windows, candidates } = shape;
  if (!Array.isArray(windows) || !windows.length || windows.length > 1024) throw wrong("it has no layers");
  const different = [...new Set(windows.filter((window) => window !== null))];
  if (different.length > 1 || !different.every(isSize)) throw wrong("windows differ");
  if (!isSize(candidates) || candidates > shape.vocab) throw wrong(`candidates is ${candidates}`);
  return { ...shape, window: different[0] ?? 0 };
}

// Returns the bytes of a tensor that the plan itself contains.
function decoded(name, base64) {
  try {
    return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  } catch {
    throw wrong(`${name} is not in base64`);
  }
}

// Returns the storage of a product.
function schemeOf(path, given, inputs) {
  const { bits, dynamic = false, halves = false, frequent = 0, zero_points: points = false } = given ?? {};
  if (![0, 4, 8].includes(bits)) throw wrong(`${path} has ${bits} bits`);
  const block = dynamic || !bits ? inputs : given.block_size;
  if (bits && !dynamic && (!BLOCKS.includes(block) || inputs % block)) throw wrong(`${path} has blocks of ${block}`);
  if (dynamic && bits !== 8) throw wrong(`${path} has ${bits} bits`);
  if (points && bits !== 4) throw wrong(`${path} has zero points`);
  if (dynamic && inputs > MOST_INPUTS) throw wrong(`${path} has ${inputs} inputs`);
  if (frequent && halves) throw wrong(`${path} has halves and frequent rows`);
  if (halves && (path !== TABLE || bits !== 8 || dynamic)) throw wrong(`${path} has halves`);
  if (frequent && (path !== TABLE || bits !== 4 || !isSize(frequent))) throw wrong(`${path} has ${frequent} frequent rows`);
  return { bits: halves ? 4 : bits, block, points, dynamic, halves, frequent };
}

// Sizes are small enough for products of two of them to be exact.
function isSize(number) {
  return Number.isInteger(number) && number > 0 && number < 2 ** 26;
}

const shared = new DataView(new ArrayBuffer(4));
function float(number) {
  shared.setFloat32(0, number);
  return shared.getUint32(0);
}

const bytesOf = (words) => new Uint8Array(Uint32Array.from(words).buffer);
