// Chooses the next token from logits (V,), with the same steps in the same order as slm.runtime.sampling. The random numbers
// differ: a seed gives the same text here each time, but not that of `slm generate`.

const DEFAULTS = { temperature: 0.8, topK: 40, topP: 0.95, minP: 0, seed: 0 };

export class Sampler {
  #options;
  #random;

  // options: temperature (0 is greedy), topK (0 keeps all), topP (1 keeps all), minP (0 keeps all), seed.
  constructor(options) {
    this.#options = { ...DEFAULTS, ...options };
    this.#random = randomNumbers(this.#options.seed);
  }

  choose(logits) {
    if (this.#options.temperature === 0) return likeliest(logits);
    const { ids, probabilities } = distribution(logits, this.#options);
    return ids[draw(probabilities, this.#random())];
  }
}

export function likeliest(row) {
  let best = 0;
  for (let i = 1; i < row.length; i++) if (row[i] > row[best]) best = i;
  return best;
}

// Returns the candidate ids in ascending order and their probabilities, for a temperature above 0.
export function distribution(logits, { temperature, topK, topP, minP }) {
  let ids = keepTopK(logits, topK);
  let row = softmax(ids.map((i) => logits[i]), temperature);
  for (const [keep, value, everything] of [[keepTopP, topP, 1], [keepMinP, minP, 0]]) {
    if (value === everything) continue;
    const kept = keep(row, value);
    const sum = kept.reduce((total, i) => total + row[i], 0);
    ids = kept.map((i) => ids[i]);
    row = kept.map((i) => row[i] / sum);
  }
  return { ids, probabilities: row };
}

export function softmax(logits, temperature) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const weights = logits.map((logit) => Math.exp((logit - largest) / Math.max(temperature, 1e-30)));
  const sum = weights.reduce((a, b) => a + b, 0);
  return weights.map((weight) => weight / sum);
}

// Returns the indices of the k largest, in ascending order; ties at the limit stay. 0 keeps all.
export function keepTopK(row, k) {
  const border = k > 0 && k < row.length ? kthLargest(row, k) : -Infinity;
  const kept = [];
  for (let i = 0; i < row.length; i++) if (row[i] >= border) kept.push(i);
  return kept;
}

// Returns the smallest set of the likeliest whose probabilities sum to p; at least one, and of equal ones the first.
export function keepTopP(probabilities, p) {
  for (let size = 64; ; size *= 16) { // confident models need few candidates, so only a few are sorted at first
    const among = keepTopK(probabilities, size).sort((a, b) => probabilities[b] - probabilities[a] || a - b);
    let mass = 0;
    const count = among.findIndex((i) => (mass += probabilities[i]) >= p) + 1;
    if (count || among.length === probabilities.length) return among.slice(0, count || among.length).sort((a, b) => a - b);
  }
}

// Returns the candidates at least p times as likely as the likeliest.
export function keepMinP(probabilities, p) {
  const border = p * probabilities.reduce((a, b) => Math.max(a, b), 0);
  return probabilities.map((_, i) => i).filter((i) => probabilities[i] >= border);
}

// Returns an index drawn from probabilities, for a number from 0 to 1.
export function draw(probabilities, point) {
  let last = 0;
  for (let i = 0; i < probabilities.length; i++) {
    if (!probabilities[i]) continue;
    last = i;
    point -= probabilities[i];
    if (point < 0) return i;
  }
  return last;
}

// Random numbers from 0 to 1, 53 bits each, by xoshiro128** (Blackman and Vigna, 2018), seeded with splitmix32.
export function randomNumbers(seed) {
  const parts = [seed >>> 0, Math.floor(seed / 2 ** 32) >>> 0];
  const state = new Uint32Array(4);
  for (let i = 0; i < 4; i++) {
    const which = i % 2;
    parts[which] = (parts[which] + 0x9e3779b9 * (1 + i)) >>> 0;
    let mixed = parts[which];
    mixed = Math.imul(mixed ^ (mixed >>> 16), 0x85ebca6b);
    mixed = Math.imul(mixed ^ (mixed >>> 13), 0xc2b2ae35);
    state[i] = (mixed ^ (mixed >>> 16)) >>> 0;
  }
  const turn = (value, bits) => ((value << bits) | (value >>> (32 - bits))) >>> 0;
  const next = () => {
    const result = Math.imul(turn(Math.imul(state[1], 5) >>> 0, 7), 9) >>> 0;
    const shifted = state[1] << 9;
    state[2] ^= state[0];
    state[3] ^= state[1];
    state[1] ^= state[2];
    state[0] ^= state[3];
    state[2] ^= shifted;
    state[3] = turn(state[3], 11);
    return result;
  };
  return () => ((next() >>> 5) * 2 ** 26 + (next() >>> 6)) / 2 ** 53;
}

// Returns the k-th largest value: the root of a min-heap of the k largest so far.
function kthLargest(row, k) {
  const heap = Float64Array.from(row.slice(0, k)).sort();
  for (let i = k; i < row.length; i++) {
    if (!(row[i] > heap[0])) continue;
    let at = 0;
    for (;;) {
      let child = 2 * at + 1;
      if (child >= k) break;
      if (child + 1 < k && heap[child + 1] < heap[child]) child += 1;
      if (heap[child] >= row[i]) break;
      heap[at] = heap[child];
      at = child;
    }
    heap[at] = row[i];
  }
  return heap[0];
}
