// The functions between the products, in float32.
#include "engine.h"

// e to the power x, within 2 units in the last place.
INLINE v128_t exponential(v128_t x) {
  x = wasm_f32x4_pmin(wasm_f32x4_pmax(x, wasm_f32x4_splat(-87.0f)), wasm_f32x4_splat(88.0f));
  v128_t n = wasm_f32x4_nearest(wasm_f32x4_mul(x, wasm_f32x4_splat(1.44269504f)));
  x = wasm_f32x4_sub(x, wasm_f32x4_mul(n, wasm_f32x4_splat(0.693359375f)));
  x = wasm_f32x4_sub(x, wasm_f32x4_mul(n, wasm_f32x4_splat(-2.12194440e-4f)));
  const float of[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                      4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  v128_t y = wasm_f32x4_splat(of[0]);
#pragma clang loop unroll(full)
  for (int i = 1; i < 6; i++) y = wasm_f32x4_add(wasm_f32x4_mul(y, x), wasm_f32x4_splat(of[i]));
  y = wasm_f32x4_add(wasm_f32x4_add(wasm_f32x4_mul(y, wasm_f32x4_mul(x, x)), x), wasm_f32x4_splat(1));
  v128_t power = wasm_i32x4_shl(wasm_i32x4_add(wasm_i32x4_trunc_sat_f32x4(n), wasm_i32x4_splat(127)), 23);
  return wasm_f32x4_mul(y, power);
}

// 1 / (1 + e to the power -x).
INLINE v128_t sigmoid(v128_t x) {
  v128_t one = wasm_f32x4_splat(1);
  return wasm_f32x4_div(one, wasm_f32x4_add(one, exponential(wasm_f32x4_neg(x))));
}

// x Φ(x), with the error function of Abramowitz and Stegun, 7.1.26, whose error is at most 1.5e-7.
INLINE v128_t gelu(v128_t x) {
  v128_t one = wasm_f32x4_splat(1), z = wasm_f32x4_mul(wasm_f32x4_abs(x), wasm_f32x4_splat(0.70710678f));
  v128_t t = wasm_f32x4_div(one, wasm_f32x4_add(one, wasm_f32x4_mul(wasm_f32x4_splat(0.3275911f), z)));
  const float of[] = {1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
  v128_t y = wasm_f32x4_splat(of[0]);
#pragma clang loop unroll(full)
  for (int i = 1; i < 5; i++) y = wasm_f32x4_add(wasm_f32x4_mul(y, t), wasm_f32x4_splat(of[i]));
  y = wasm_f32x4_mul(wasm_f32x4_mul(y, t), exponential(wasm_f32x4_neg(wasm_f32x4_mul(z, z)))); // 1 - erf(z)
  v128_t negative = wasm_f32x4_lt(x, wasm_f32x4_splat(0)), two = wasm_f32x4_sub(wasm_f32x4_splat(2), y);
  return wasm_f32x4_mul(wasm_f32x4_mul(x, wasm_f32x4_splat(0.5f)), wasm_v128_bitselect(y, two, negative));
}

// Writes the root-mean-square norm of x times a weight; x and `to` may be the same.
void rms_norm(const float *x, const float *weight, float *to, uint32_t size, float epsilon) {
  v128_t even = wasm_f32x4_splat(0), odd = even;
  for (uint32_t i = 0; i < size; i += 8) {
    v128_t a = wasm_v128_load(x + i), b = wasm_v128_load(x + i + 4);
    even = wasm_f32x4_add(even, wasm_f32x4_mul(a, a));
    odd = wasm_f32x4_add(odd, wasm_f32x4_mul(b, b));
  }
  v128_t factor = wasm_f32x4_splat(1 / __builtin_sqrtf(sum4(wasm_f32x4_add(even, odd)) / (float)size + epsilon));
  for (uint32_t i = 0; i < size; i += 4) {
    wasm_v128_store(to + i, wasm_f32x4_mul(wasm_f32x4_mul(wasm_v128_load(x + i), factor), wasm_v128_load(weight + i)));
  }
}

// Rotates pairs (i, i + size / 2) of a head.
void rotate(float *x, const float *cosine, const float *sine, uint32_t size) {
  for (uint32_t i = 0, half = size / 2; i < half; i += 4) {
    v128_t a = wasm_v128_load(x + i), b = wasm_v128_load(x + half + i);
    v128_t c = wasm_v128_load(cosine + i), s = wasm_v128_load(sine + i);
    wasm_v128_store(x + i, wasm_f32x4_sub(wasm_f32x4_mul(a, c), wasm_f32x4_mul(b, s)));
    wasm_v128_store(x + half + i, wasm_f32x4_add(wasm_f32x4_mul(b, c), wasm_f32x4_mul(a, s)));
  }
}

// Writes activation(gate) * up.
void activate(uint32_t name, const float *gate, const float *up, float *to, uint32_t size) {
  for (uint32_t i = 0; i < size; i += 4) {
    v128_t x = wasm_v128_load(gate + i), y;
    if (name == GELU_TANH) {
      v128_t cube = wasm_f32x4_mul(wasm_f32x4_mul(x, x), wasm_f32x4_mul(x, wasm_f32x4_splat(0.044715f)));
      y = wasm_f32x4_mul(x, sigmoid(wasm_f32x4_mul(wasm_f32x4_add(x, cube), wasm_f32x4_splat(1.59576912f))));
    } else if (name == GELU) {
      y = gelu(x);
    } else if (name == SILU) {
      y = wasm_f32x4_mul(x, sigmoid(x));
    } else {
      y = wasm_f32x4_pmax(x, wasm_f32x4_splat(0));
    }
    wasm_v128_store(to + i, wasm_f32x4_mul(y, wasm_v128_load(up + i)));
  }
}

// Replaces scores by their exponentials over the largest; returns the sum. The scores have room for three more numbers.
float softmax(float *scores, uint32_t count) {
  for (uint32_t i = count; i % 4; i++) scores[i] = -1e30f;
  v128_t most = wasm_v128_load(scores), sum = wasm_f32x4_splat(0);
  for (uint32_t i = 4; i < count; i += 4) most = wasm_f32x4_pmax(most, wasm_v128_load(scores + i));
  most = wasm_f32x4_pmax(most, wasm_i32x4_shuffle(most, most, 2, 3, 0, 1));
  most = wasm_f32x4_pmax(most, wasm_i32x4_shuffle(most, most, 1, 0, 3, 2));
  for (uint32_t i = 0; i < count; i += 4) {
    v128_t difference = wasm_f32x4_sub(wasm_v128_load(scores + i), most);
    v128_t y = wasm_v128_and(exponential(difference), wasm_f32x4_gt(difference, wasm_f32x4_splat(-87.0f)));
    sum = wasm_f32x4_add(sum, y);
    wasm_v128_store(scores + i, y);
  }
  return sum4(sum);
}
