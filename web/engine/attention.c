// Grouped-query attention on caches of floats or of 8-bit integers with a scale for each channel.
#include "engine.h"

// What a step's attention is about, in one layer and one thread.
struct attention {
  const struct model *m;
  const struct layer *l;
  uint32_t past, tokens, thread;
};

INLINE uint32_t bytes_of(const struct model *m) { return m->small_cache ? 1 : 4; }

// The address of a position in a cache, and in `left` how many positions follow it there, itself included.
INLINE uint8_t *place_of(const struct model *m, const struct layer *l, void *cache, uint32_t head, uint32_t position,
                         uint32_t *left) {
  size_t row = m->head_dim * bytes_of(m);
  if (l->window) {
    uint32_t slot = position % m->capacity;
    *left = m->capacity - slot;
    return (uint8_t *)cache + ((size_t)head * m->capacity + slot) * row;
  }
  uint32_t slot = position % m->page;
  *left = m->page - slot;
  return m->pages[position / m->page] + (size_t)cache + ((size_t)head * m->page + slot) * row;
}

static void store(const struct model *m, const struct layer *l, void *cache, const float *scale, uint32_t head,
                  uint32_t position, const float *x) {
  uint32_t left, size = m->head_dim;
  uint8_t *to = place_of(m, l, cache, head, position, &left);
  if (!m->small_cache) {
    __builtin_memcpy(to, x, size * sizeof(float));
    return;
  }
  scale += head * size;
  for (uint32_t i = 0; i < size; i += 4) {
    v128_t y = wasm_f32x4_nearest(wasm_f32x4_div(wasm_v128_load(x + i), wasm_v128_load(scale + i)));
    y = wasm_i32x4_trunc_sat_f32x4(y);
    y = wasm_i16x8_narrow_i32x4(y, y);
    wasm_v128_store32_lane(to + i, wasm_i8x16_narrow_i16x8(y, y), 0);
  }
}

// Norms and rotates a query or a key in place, and stores the key and its value. `head` counts the queries, then the keys.
void store_heads(const struct model *m, const struct layer *l, uint32_t past, uint32_t token, uint32_t head) {
  uint32_t size = m->head_dim, half = size / 2;
  float *row = m->wide + (size_t)token * (m->heads + 2 * m->kv_heads) * size, *x = row + head * size;
  int query = head < m->heads;
  rms_norm(x, query ? l->query_norm : l->key_norm, x, size, m->epsilon);
  rotate(x, m->cosines[l->rotation] + token * half, m->sines[l->rotation] + token * half, size);
  if (query) return;
  store(m, l, l->keys, l->key_scale, head - m->heads, past + token, x);
  store(m, l, l->values, l->value_scale, head - m->heads, past + token, x + m->kv_heads * size);
}

#define UNROLL _Pragma("clang loop unroll(full)")

// Scores of `count` positions (k) for C heads (q).
INLINE void score(const float *q, const float *k, uint32_t count, uint32_t size, float scale, float *to, uint32_t longest,
                  const uint32_t C) {
  uint32_t p = 0;
  for (; p + 2 <= count; p += 2, k += 2 * size) {
    v128_t first[4], second[4];
    UNROLL for (uint32_t h = 0; h < C; h++) first[h] = second[h] = wasm_f32x4_splat(0);
    for (uint32_t i = 0; i < size; i += 4) {
      v128_t a = wasm_v128_load(k + i), b = wasm_v128_load(k + size + i);
      UNROLL for (uint32_t h = 0; h < C; h++) {
        v128_t x = wasm_v128_load(q + h * size + i);
        first[h] = wasm_f32x4_add(first[h], wasm_f32x4_mul(x, a));
        second[h] = wasm_f32x4_add(second[h], wasm_f32x4_mul(x, b));
      }
    }
    UNROLL for (uint32_t h = 0; h < C; h++) {
      to[h * longest + p] = sum4(first[h]) * scale;
      to[h * longest + p + 1] = sum4(second[h]) * scale;
    }
  }
  if (p == count) return;
  UNROLL for (uint32_t h = 0; h < C; h++) {
    v128_t sum = wasm_f32x4_splat(0);
    for (uint32_t i = 0; i < size; i += 4) {
      sum = wasm_f32x4_add(sum, wasm_f32x4_mul(wasm_v128_load(q + h * size + i), wasm_v128_load(k + i)));
    }
    to[h * longest + p] = sum4(sum) * scale;
  }
}

// Adds to `out` the values (v) of `count` positions times their weights, for one head, in the order of the positions.
static void weigh(const float *weights, const float *v, uint32_t count, uint32_t size, float *out) {
  uint32_t p = 0;
  for (; p + 4 <= count; p += 4, v += 4 * size) {
    v128_t a = wasm_v128_load32_splat(weights + p), b = wasm_v128_load32_splat(weights + p + 1);
    v128_t c = wasm_v128_load32_splat(weights + p + 2), d = wasm_v128_load32_splat(weights + p + 3);
    for (uint32_t i = 0; i < size; i += 4) {
      v128_t sum = wasm_f32x4_add(wasm_v128_load(out + i), wasm_f32x4_mul(a, wasm_v128_load(v + i)));
      sum = wasm_f32x4_add(sum, wasm_f32x4_mul(b, wasm_v128_load(v + size + i)));
      sum = wasm_f32x4_add(sum, wasm_f32x4_mul(c, wasm_v128_load(v + 2 * size + i)));
      wasm_v128_store(out + i, wasm_f32x4_add(sum, wasm_f32x4_mul(d, wasm_v128_load(v + 3 * size + i))));
    }
  }
  for (; p < count; p++, v += size) {
    v128_t a = wasm_v128_load32_splat(weights + p);
    for (uint32_t i = 0; i < size; i += 4) {
      wasm_v128_store(out + i, wasm_f32x4_add(wasm_v128_load(out + i), wasm_f32x4_mul(a, wasm_v128_load(v + i))));
    }
  }
}

// Returns positions of a cache from `first` on as floats, at most `*count`: the cache itself, or `TILE` positions of an 8-bit
// cache, converted into `tile`. As in the graph, steps of many tokens read their own keys and values as they were before they
// were rounded: from `own`, which has a row for each new token.
static const float *floats_of(const struct attention *at, void *cache, const float *scale, uint32_t kv, uint32_t first,
                              uint32_t *count, const float *own, float *tile) {
  const struct model *m = at->m;
  uint32_t size = m->head_dim, left;
  const uint8_t *from = place_of(m, at->l, cache, kv, first, &left);
  *count = least(*count, left);
  if (!m->small_cache) return (const float *)from;
  *count = least(*count, TILE);
  if (own && first >= at->past) {
    uint32_t width = (m->heads + 2 * m->kv_heads) * size;
    for (uint32_t p = 0; p < *count; p++) {
      __builtin_memcpy(tile + p * size, own + (size_t)(first - at->past + p) * width, size * sizeof(float));
    }
    return tile;
  }
  if (own) *count = least(*count, at->past - first);
  scale += kv * size;
  for (uint32_t p = 0; p < *count; p++, from += size) {
    for (uint32_t i = 0; i < size; i += 8) {
      v128_t x = wasm_i16x8_load8x8(from + i);
      v128_t low = wasm_f32x4_convert_i32x4(wasm_i32x4_extend_low_i16x8(x));
      v128_t high = wasm_f32x4_convert_i32x4(wasm_i32x4_extend_high_i16x8(x));
      wasm_v128_store(tile + p * size + i, wasm_f32x4_mul(low, wasm_v128_load(scale + i)));
      wasm_v128_store(tile + p * size + i + 4, wasm_f32x4_mul(high, wasm_v128_load(scale + i + 4)));
    }
  }
  return tile;
}

// Attends with C heads of a token, which share a kv head.
INLINE void attend_heads(const struct attention *at, uint32_t token, uint32_t head, const uint32_t C) {
  const struct model *m = at->m;
  const struct layer *l = at->l;
  uint32_t size = m->head_dim, kv = head / (m->heads / m->kv_heads), end = at->past + token + 1;
  uint32_t first = l->window && end > l->window ? end - l->window : 0, count = end - first;
  const float *q = m->wide + (size_t)token * (m->heads + 2 * m->kv_heads) * size + head * size;
  float *out = m->attended + ((size_t)token * m->heads + head) * size;
  float *scores = m->scores + (size_t)at->thread * 4 * m->longest, *tile = m->tile + (size_t)at->thread * TILE * size;
  const float *keys = at->tokens > FEW_TOKENS ? m->wide + (m->heads + kv) * size : 0;
  const float *values = keys ? keys + m->kv_heads * size : 0;
  for (uint32_t done = 0, some; done < count; done += some) {
    some = count - done;
    const float *k = floats_of(at, l->keys, l->key_scale, kv, first + done, &some, keys, tile);
    score(q, k, some, size, m->scale, scores + done, m->longest, C);
  }
  for (uint32_t h = 0; h < C; h++) {
    float *each = scores + h * m->longest;
    v128_t factor = wasm_f32x4_splat(1 / softmax(each, count));
    for (uint32_t p = 0; p < count; p += 4) wasm_v128_store(each + p, wasm_f32x4_mul(wasm_v128_load(each + p), factor));
    for (uint32_t i = 0; i < size; i += 4) wasm_v128_store(out + h * size + i, wasm_f32x4_splat(0));
  }
  for (uint32_t done = 0, some; done < count; done += some) {
    some = count - done;
    const float *v = floats_of(at, l->values, l->value_scale, kv, first + done, &some, values, tile);
    UNROLL for (uint32_t h = 0; h < C; h++) weigh(scores + h * m->longest + done, v, some, size, out + h * size);
  }
}

#define HEADS __attribute__((noinline)) static void
HEADS attend_one(const struct attention *at, uint32_t token, uint32_t head) { attend_heads(at, token, head, 1); }
HEADS attend_two(const struct attention *at, uint32_t token, uint32_t head) { attend_heads(at, token, head, 2); }
HEADS attend_four(const struct attention *at, uint32_t token, uint32_t head) { attend_heads(at, token, head, 4); }

// Attends with a thread's part of the heads of all tokens from `first` on.
void attend(const struct model *m, const struct layer *l, uint32_t past, uint32_t tokens, uint32_t first, uint32_t thread,
            uint32_t threads) {
  struct attention at = {m, l, past, tokens, thread};
  uint32_t from, to, group = m->heads / m->kv_heads;
  part((tokens - first) * m->heads, 1, thread, threads, &from, &to);
  while (from < to) {
    uint32_t token = first + from / m->heads, head = from % m->heads, several = least(to - from, group - head % group);
    if (several >= 4) attend_four(&at, token, head), from += 4;
    else if (several >= 2) attend_two(&at, token, head), from += 2;
    else attend_one(&at, token, head), from++;
  }
}
