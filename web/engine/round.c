// Activations rounded to integers: by block, or by token for weights by columns. The largest becomes `steps_of`.
#include "engine.h"

// Beside 4-bit weights, activations have 8 bits, as in onnxruntime at accuracy level 4. Beside 8-bit weights, which are extended
// to 16 bits, 16-bit activations take no more time: their products with 256 weights, or with a column, have less than 32 bits.
INLINE float steps_of(const struct product *p) {
  if (p->kind == NIBBLES) return 127;
  if (p->kind == BYTES) return 32767;
  uint32_t most = 0x7fffffff / (128 * p->inputs);
  return most < 32767 ? (float)most : 32767;
}

// Rounds `count` activations (a multiple of 8) to 16-bit integers; returns their sum.
INLINE int32_t round_wide(const float *x, uint32_t count, float factor, int16_t *to) {
  v128_t times = wasm_f32x4_splat(factor), sum = wasm_i32x4_splat(0);
  for (uint32_t i = 0; i < count; i += 8) {
    v128_t low = wasm_i32x4_trunc_sat_f32x4(wasm_f32x4_nearest(wasm_f32x4_mul(wasm_v128_load(x + i), times)));
    v128_t high = wasm_i32x4_trunc_sat_f32x4(wasm_f32x4_nearest(wasm_f32x4_mul(wasm_v128_load(x + i + 4), times)));
    sum = wasm_i32x4_add(sum, wasm_i32x4_add(low, high));
    wasm_v128_store(to + i, wasm_i16x8_narrow_i32x4(low, high));
  }
  sum = wasm_i32x4_add(sum, wasm_i32x4_shuffle(sum, sum, 2, 3, 0, 1));
  return wasm_i32x4_extract_lane(sum, 0) + wasm_i32x4_extract_lane(sum, 1);
}

INLINE float largest_of(const float *x, uint32_t count) {
  v128_t most = wasm_f32x4_splat(0);
  for (uint32_t i = 0; i < count; i += 4) most = wasm_f32x4_pmax(most, wasm_f32x4_abs(wasm_v128_load(x + i)));
  most = wasm_f32x4_pmax(most, wasm_i32x4_shuffle(most, most, 2, 3, 0, 1));
  float a = wasm_f32x4_extract_lane(most, 0), b = wasm_f32x4_extract_lane(most, 1);
  return a > b ? a : b;
}

// Reorders up to 32 integers in the order in which kernels unpack 4-bit weights; missing ones are zeros.
INLINE void order(const int16_t *from, uint32_t count, int16_t *wide, int8_t *narrow) {
#ifdef __wasm_relaxed_simd__
  // A byte has an even input in its low bits and the next input in its high bits: first all even inputs, then all odd ones.
  for (uint32_t i = 0; i < 16; i++) {
    narrow[i] = 2 * i < count ? (int8_t)from[2 * i] : 0;
    narrow[16 + i] = 2 * i < count ? (int8_t)from[2 * i + 1] : 0;
  }
#else
  // Two bytes have four inputs: first each first input, then each second one, and so on.
  for (uint32_t j = 0; j < 4; j++)
    for (uint32_t i = 0; i < 8; i++) wide[8 * j + i] = 4 * i < count ? from[4 * i + j] : 0;
#endif
}

// Rounds one token's activations for a product. Products with floats read the activations themselves.
void round_token(const struct product *p, const float *x, const struct rounded *to, uint32_t token, const struct model *m) {
  if (p->kind == FLOATS) return;
  uint32_t blocks = p->inputs / p->block;
  float *scales = to->scales + token * m->most_blocks;
  int32_t *sums = to->sums + token * m->most_blocks, middle = p->kind == BYTES ? 128 : 8;
  int16_t *wide = to->wide + (size_t)token * m->stride, part[256];
  int8_t *narrow = to->narrow + (size_t)token * m->stride * 2;
  float steps = steps_of(p);
  for (uint32_t b = 0; b < blocks; b++) {
    const float *from = x + b * p->block;
    float most = largest_of(from, p->block);
    float factor = most > 0 ? steps / most : 0;
    scales[b] = most / steps;
    if (p->kind != NIBBLES) {
      sums[b] = -round_wide(from, p->block, factor, wide + b * p->block);
    } else {
      sums[b] = -round_wide(from, p->block, factor, part);
      uint32_t each = least(p->block, 32);
      for (uint32_t i = 0; i < p->block; i += each) {
        order(part + i, each, wide, narrow);
        wide += 32;
        narrow += 32;
      }
    }
    if (p->points) ((float *)sums)[b] = (float)sums[b] * scales[b];
    else sums[b] *= middle;
  }
}
