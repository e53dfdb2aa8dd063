// Products of rounded activations with weights in the layouts of ONNX's MatMulNBits and MatMulInteger, which stay as they are.
#include "engine.h"

// For each number of rows R and of tokens M, the compiler makes a loop with all sums in registers.
#define EACH(name, limit) for (uint32_t name = 0; name < (limit); name++)
#define UNROLL _Pragma("clang loop unroll(full)")

struct place {
  const struct product *p;
  const struct rounded *a;
  uint32_t row, token;
  float *y;
  uint32_t y_stride, a_stride, a_blocks;
};

// The start of a block's sum, in the first of four numbers: minus the sum of the activations times a constant zero point.
INLINE v128_t begin(const struct place *at, uint32_t token, uint32_t block, int points) {
  return points ? wasm_i32x4_splat(0) : wasm_v128_load32_zero(at->a->sums + token * at->a_blocks + block);
}

// The 4-bit zero point of a block.
INLINE uint32_t point_of(const uint8_t *of, uint32_t block) { return (of[block / 2] >> (block % 2 * 4)) & 15; }

// The zero points of four blocks from `block` on, as floats.
INLINE v128_t four_points(const uint8_t *of, uint32_t block) {
  v128_t each = wasm_v128_and(wasm_v128_load16_splat(of + block / 2), wasm_i32x4_const(0xf, 0xf0, 0xf00, 0xf000));
  return wasm_f32x4_mul(wasm_f32x4_convert_i32x4(each), wasm_f32x4_const(1, 1 / 16.0f, 1 / 256.0f, 1 / 4096.0f));
}

// Adds to the sums of a row what its zero points take away: each times a scale and the sum of a block's activations.
INLINE void subtract_points(const struct place *at, uint32_t row, const uint32_t M, uint32_t blocks, v128_t *total) {
  const uint8_t *of = at->p->points + (size_t)row * ((blocks + 1) / 2);
  const float *scales = at->p->scales + (size_t)row * blocks;
  const float *sums = (const float *)at->a->sums + at->token * at->a_blocks;
  uint32_t b = 0;
  for (; b + 4 <= blocks; b += 4) {
    v128_t each = wasm_f32x4_mul(four_points(of, b), wasm_v128_load(scales + b));
    UNROLL EACH(m, M) total[m] = wasm_f32x4_add(total[m], wasm_f32x4_mul(each, wasm_v128_load(sums + m * at->a_blocks + b)));
  }
  for (; b < blocks; b++) {
    v128_t each = wasm_f32x4_make((float)point_of(of, b) * scales[b], 0, 0, 0);
    UNROLL EACH(m, M) {
      total[m] = wasm_f32x4_add(total[m], wasm_f32x4_mul(each, wasm_v128_load32_splat(sums + m * at->a_blocks + b)));
    }
  }
}

INLINE void finish(const struct place *at, uint32_t R, uint32_t M, v128_t (*total)[4]) {
  UNROLL EACH(r, R) UNROLL EACH(m, M) at->y[(size_t)(at->token + m) * at->y_stride + at->row + r] = sum4(total[r][m]);
}

INLINE v128_t scaled(const struct place *at, uint32_t row, uint32_t token, uint32_t block, uint32_t blocks, v128_t sum) {
  v128_t weight = wasm_v128_load32_splat(at->p->scales + (size_t)row * blocks + block);
  v128_t activation = wasm_v128_load32_splat(at->a->scales + token * at->a_blocks + block);
  return wasm_f32x4_mul(wasm_f32x4_convert_i32x4(sum), wasm_f32x4_mul(weight, activation));
}

INLINE void bytes(const struct place *at, const uint32_t R, const uint32_t M) {
  const uint32_t inputs = at->p->inputs, size = at->p->block, blocks = inputs / size;
  const uint8_t *w = at->p->weights + (size_t)at->row * inputs;
  const int16_t *x = at->a->wide + (size_t)at->token * at->a_stride;
  v128_t total[4][4], sum[4][4];
  UNROLL EACH(r, R) UNROLL EACH(m, M) total[r][m] = wasm_f32x4_splat(0);
  for (uint32_t b = 0; b < blocks; b++) {
    UNROLL EACH(r, R) UNROLL EACH(m, M) sum[r][m] = begin(at, at->token + m, b, 0);
    for (const uint8_t *end = w + size; w < end; w += 8, x += 8) {
      v128_t values[4];
      UNROLL EACH(m, M) values[m] = wasm_v128_load(x + (size_t)m * at->a_stride);
      UNROLL EACH(r, R) {
        v128_t weights = wasm_u16x8_load8x8(w + (size_t)r * inputs);
        UNROLL EACH(m, M) sum[r][m] = wasm_i32x4_add(sum[r][m], wasm_i32x4_dot_i16x8(weights, values[m]));
      }
    }
    UNROLL EACH(r, R) UNROLL EACH(m, M) {
      total[r][m] = wasm_f32x4_add(total[r][m], scaled(at, at->row + r, at->token + m, b, blocks, sum[r][m]));
    }
  }
  finish(at, R, M, total);
}

// The sum of products of up to 32 4-bit weights (`packed`) with activations in the order of `round.c`.
INLINE v128_t nibbles_of(v128_t packed, const int16_t *x, v128_t sum) {
#ifdef __wasm_relaxed_simd__
  v128_t mask = wasm_i8x16_splat(15), low = wasm_v128_and(packed, mask), high = wasm_v128_and(wasm_u16x8_shr(packed, 4), mask);
  // A pair of products is at most 2 * 127 * 15, so that pairs of both halves fit in 16 bits.
  v128_t pairs = wasm_i16x8_add(wasm_i16x8_relaxed_dot_i8x16_i7x16(wasm_v128_load(x), low),
                                wasm_i16x8_relaxed_dot_i8x16_i7x16(wasm_v128_load(x + 8), high));
  return wasm_i32x4_add(sum, wasm_i32x4_dot_i16x8(pairs, wasm_i16x8_splat(1)));
#else
  v128_t mask = wasm_i16x8_splat(15);
  sum = wasm_i32x4_add(sum, wasm_i32x4_dot_i16x8(wasm_v128_and(packed, mask), wasm_v128_load(x)));
  sum = wasm_i32x4_add(sum, wasm_i32x4_dot_i16x8(wasm_v128_and(wasm_u16x8_shr(packed, 4), mask), wasm_v128_load(x + 8)));
  sum = wasm_i32x4_add(sum, wasm_i32x4_dot_i16x8(wasm_v128_and(wasm_u16x8_shr(packed, 8), mask), wasm_v128_load(x + 16)));
  return wasm_i32x4_add(sum, wasm_i32x4_dot_i16x8(wasm_u16x8_shr(packed, 12), wasm_v128_load(x + 24)));
#endif
}

INLINE void nibbles(const struct place *at, const uint32_t R, const uint32_t M, const int points, const uint32_t each) {
  const uint32_t inputs = at->p->inputs, size = at->p->block, blocks = inputs / size;
  const uint8_t *w = at->p->weights + (size_t)at->row * (inputs / 2);
  const int16_t *x = at->a->wide + (size_t)at->token * at->a_stride;
#ifdef __wasm_relaxed_simd__
  const uint32_t step = 16; // 32 8-bit integers
#else
  const uint32_t step = 32;
#endif
  v128_t total[4][4], sum[4][4];
  UNROLL EACH(r, R) UNROLL EACH(m, M) total[r][m] = wasm_f32x4_splat(0);
  for (uint32_t b = 0; b < blocks; b++) {
    UNROLL EACH(r, R) UNROLL EACH(m, M) sum[r][m] = begin(at, at->token + m, b, points);
    for (const uint8_t *end = w + size / 2; w < end; w += each / 2, x += step) {
      UNROLL EACH(r, R) {
        const uint8_t *from = w + (size_t)r * (inputs / 2);
        v128_t packed = each == 32 ? wasm_v128_load(from) : wasm_v128_load64_zero(from);
        UNROLL EACH(m, M) sum[r][m] = nibbles_of(packed, x + (size_t)m * at->a_stride, sum[r][m]);
      }
    }
    UNROLL EACH(r, R) UNROLL EACH(m, M) {
      total[r][m] = wasm_f32x4_add(total[r][m], scaled(at, at->row + r, at->token + m, b, blocks, sum[r][m]));
    }
  }
  if (points) UNROLL EACH(r, R) subtract_points(at, at->row + r, M, blocks, total[r]);
  finish(at, R, M, total);
}

INLINE void floats(const struct place *at, const float *values, const uint32_t R, const uint32_t M) {
  const uint32_t inputs = at->p->inputs;
  const float *w = (const float *)at->p->weights + (size_t)at->row * inputs, *x = values + (size_t)at->token * inputs;
  v128_t total[4][4];
  UNROLL EACH(r, R) UNROLL EACH(m, M) total[r][m] = wasm_f32x4_splat(0);
  for (uint32_t i = 0; i < inputs; i += 4) {
    UNROLL EACH(r, R) {
      v128_t weights = wasm_v128_load(w + (size_t)r * inputs + i);
      UNROLL EACH(m, M) {
        total[r][m] = wasm_f32x4_add(total[r][m], wasm_f32x4_mul(weights, wasm_v128_load(x + (size_t)m * inputs + i)));
      }
    }
  }
  finish(at, R, M, total);
}

// Reads a byte of each cache line, so that all of them are fetched at the same time while the rows before are multiplied. The
// processor itself does not fetch several rows ahead: without this, a step takes more than twice as long.
INLINE void fetch(const void *from, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) (void)*((const volatile uint8_t *)from + i);
}

INLINE void fetch_rows(const struct product *p, uint32_t row, uint32_t count, const uint32_t kind) {
  size_t bytes = kind == FLOATS ? 4 * p->inputs : kind == BYTES ? p->inputs : p->inputs / 2;
  fetch(p->weights + row * bytes, count * bytes);
  if (kind == FLOATS) return;
  size_t blocks = p->inputs / p->block;
  fetch(p->scales + row * blocks, 4 * count * blocks);
}

// A kernel for R rows and M tokens of a kind of weights. All arguments but the first are constants.
INLINE void kernel(const struct place *at, const float *x, const uint32_t kind, const int points, const uint32_t each,
                   const uint32_t R, const uint32_t M) {
  if (kind == BYTES) bytes(at, R, M);
  else if (kind == NIBBLES) nibbles(at, R, M, points, each);
  else floats(at, x, R, M);
}

// Calls a kernel for all rows and tokens, four rows and two tokens at a time while there are so many.
INLINE void all(struct place at, const float *x, uint32_t tokens, uint32_t to, const uint32_t kind, const int points,
                const uint32_t each) {
  const uint32_t ahead = kind == NIBBLES ? 8 : 4, start = at.row;
  for (; at.row + 4 <= to; at.row += 4) {
    if ((at.row - start) % ahead == 0 && at.row + 2 * ahead <= to) fetch_rows(at.p, at.row + ahead, ahead, kind);
    for (at.token = 0; at.token + 2 <= tokens; at.token += 2) kernel(&at, x, kind, points, each, 4, 2);
    if (at.token < tokens) kernel(&at, x, kind, points, each, 4, 1);
  }
  for (; at.row < to; at.row++)
    for (at.token = 0; at.token < tokens; at.token++) kernel(&at, x, kind, points, each, 1, 1);
}

#define LOOP __attribute__((noinline)) static void
LOOP all_floats(struct place at, const float *x, uint32_t tokens, uint32_t to) { all(at, x, tokens, to, FLOATS, 0, 0); }
LOOP all_bytes(struct place at, uint32_t tokens, uint32_t to) { all(at, 0, tokens, to, BYTES, 0, 0); }
LOOP all_nibbles(struct place at, uint32_t tokens, uint32_t to) { all(at, 0, tokens, to, NIBBLES, 0, 32); }
LOOP all_nibbles_with_points(struct place at, uint32_t tokens, uint32_t to) { all(at, 0, tokens, to, NIBBLES, 1, 32); }
LOOP all_short_nibbles(struct place at, uint32_t tokens, uint32_t to) { all(at, 0, tokens, to, NIBBLES, 0, 16); }
LOOP all_short_nibbles_with_points(struct place at, uint32_t tokens, uint32_t to) {
  all(at, 0, tokens, to, NIBBLES, 1, 16);
}

// Rows of W whose sums are computed at a time.
#define WIDTH 1024

// Weights by columns: a pass over four inputs adds their products to the sums of all rows, which stay in the cache.
__attribute__((noinline)) static void columns(const struct place *at, uint32_t tokens, uint32_t from, uint32_t to) {
  const uint32_t rows = at->p->rows, inputs = at->p->inputs;
  for (uint32_t start = from; start < to; start += WIDTH) {
    uint32_t end = least(start + WIDTH, to);
    for (uint32_t t = 0; t < tokens; t++) {
      int32_t sums[WIDTH];
      const int16_t *x = at->a->wide + (size_t)t * at->a_stride;
      for (uint32_t i = 0; i < WIDTH; i += 4) wasm_v128_store(sums + i, wasm_i32x4_splat(0));
      for (uint32_t k = 0; k < inputs; k += 4) { // inputs are a multiple of 8
        const int8_t *w = (const int8_t *)at->p->weights + (size_t)k * rows;
        if (t == 0 && k + 8 <= inputs) {
          for (uint32_t j = 4; j < 8; j++) fetch(w + (size_t)j * rows + start, end - start);
        }
        v128_t first = wasm_v128_load32_splat(x + k), second = wasm_v128_load32_splat(x + k + 2); // two inputs each
        uint32_t n = start;
        for (; n + 8 <= end; n += 8) {
          v128_t a = wasm_i16x8_load8x8(w + n), b = wasm_i16x8_load8x8(w + rows + n);
          v128_t c = wasm_i16x8_load8x8(w + 2 * rows + n), d = wasm_i16x8_load8x8(w + 3 * rows + n);
          v128_t low = wasm_i32x4_add(wasm_i32x4_dot_i16x8(wasm_i16x8_shuffle(a, b, 0, 8, 1, 9, 2, 10, 3, 11), first),
                                      wasm_i32x4_dot_i16x8(wasm_i16x8_shuffle(c, d, 0, 8, 1, 9, 2, 10, 3, 11), second));
          v128_t high = wasm_i32x4_add(wasm_i32x4_dot_i16x8(wasm_i16x8_shuffle(a, b, 4, 12, 5, 13, 6, 14, 7, 15), first),
                                       wasm_i32x4_dot_i16x8(wasm_i16x8_shuffle(c, d, 4, 12, 5, 13, 6, 14, 7, 15), second));
          int32_t *to = sums + (n - start);
          wasm_v128_store(to, wasm_i32x4_add(wasm_v128_load(to), low));
          wasm_v128_store(to + 4, wasm_i32x4_add(wasm_v128_load(to + 4), high));
        }
        for (; n < end; n++)
          for (uint32_t j = 0; j < 4; j++) sums[n - start] += w[(size_t)j * rows + n] * x[k + j];
      }
      float scale = at->a->scales[t * at->a_blocks], *y = at->y + (size_t)t * at->y_stride;
      for (uint32_t n = start; n < end; n++) y[n] = (float)sums[n - start] * (at->p->scales[n] * scale);
    }
  }
}

// Multiplies the activations of some tokens, rounded (`a`) or as they are (`x`), with the rows of W from `from` to before `to`.
void multiply(const struct product *p, const struct rounded *a, const float *x, uint32_t tokens, float *y, uint32_t stride,
              uint32_t from, uint32_t to, const struct model *m) {
  struct place at = {p, a, from, 0, y, stride, m->stride, m->most_blocks};
  switch (p->kind) {
    case FLOATS: return all_floats(at, x, tokens, to);
    case BYTES: return all_bytes(at, tokens, to);
    case NIBBLES:
      if (p->block < 32) return p->points ? all_short_nibbles_with_points(at, tokens, to) : all_short_nibbles(at, tokens, to);
      return p->points ? all_nibbles_with_points(at, tokens, to) : all_nibbles(at, tokens, to);
    default: return columns(&at, tokens, from, to);
  }
}

// Dequantizes a row of a table, times `scale`; adds it to `to` if `add`.
void look_up(const struct product *p, uint32_t row, float *to, float scale, int add) {
  uint32_t blocks = p->inputs / (p->kind == FLOATS ? p->inputs : p->block);
  uint32_t bits = p->kind == NIBBLES ? 4 : 8;
  for (uint32_t i = 0; i < p->inputs; i++) {
    float value;
    if (p->kind == FLOATS) {
      value = ((const float *)p->weights)[(size_t)row * p->inputs + i];
    } else {
      uint32_t b = i / p->block;
      size_t at = (size_t)row * p->inputs + i;
      int32_t q = bits == 8 ? p->weights[at] : (p->weights[at / 2] >> (at % 2 * 4)) & 15;
      int32_t point = 1 << (bits - 1);
      if (p->points) point = (int32_t)point_of(p->points + (size_t)row * ((blocks + 1) / 2), b);
      value = (float)(q - point) * p->scales[(size_t)row * blocks + b];
    }
    to[i] = value * scale + (add ? to[i] : 0);
  }
}
