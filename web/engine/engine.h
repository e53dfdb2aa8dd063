// The data that the engine reads, and its functions. A table of 32-bit words describes the model; static/engine.js writes it.
// Dimensions: D hidden, N heads, K kv heads, H head dim, F intermediate, V vocabulary, T new tokens.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <wasm_simd128.h>

#define INLINE static inline __attribute__((always_inline))
#define EXPORT(name) __attribute__((export_name(name)))

// The storage of a product's weight.
enum { FLOATS, BYTES, NIBBLES, COLUMNS };
enum { GELU_TANH, GELU, SILU, RELU };

// A product y = x Wᵀ with W (rows, inputs).
struct product {
  // FLOATS: float (rows, inputs); BYTES, NIBBLES: unsigned 8- and 4-bit integers (rows, inputs); COLUMNS: int8 (inputs, rows).
  uint32_t kind;
  uint32_t rows, inputs;
  uint32_t block;        // inputs that share a scale
  const uint8_t *weights;
  const float *scales;   // (rows, inputs / block)
  const uint8_t *points; // of NIBBLES: 4-bit zero points (rows, bytes of all blocks); 0 if they are the middle of the range
};

struct layer {
  uint32_t window;       // positions that a token attends to; 0 for all
  uint32_t rotation;     // index of its cosines and sines
  void *keys, *values;   // a sliding layer's caches (K, capacity, H); for a global layer their offsets in each page
  const float *key_scale, *value_scale; // (K, H), of 8-bit caches
  const float *input_norm, *query_norm, *key_norm, *attention_norm, *mlp_norm, *output_norm;
  struct product qkv, o, gate_up, down;
};

// Activations of T tokens as a product reads them.
struct rounded {
  int16_t *wide;         // 16-bit integers (T, stride)
  int8_t *narrow;        // the same memory, for kernels that read 8-bit integers
  float *scales;         // (T, blocks)
  // For each block minus the sum of its integers, times the zero point of the weights; if blocks have their own zero points,
  // times the scale instead, as a float.
  int32_t *sums;
};

struct team;

struct model {
  uint32_t hidden, layers, heads, kv_heads, head_dim, inner, vocab, activation;
  uint32_t capacity;     // positions of a sliding layer's cache
  uint32_t page;         // positions of a page of the global layers' caches
  uint32_t small_cache;  // whether caches are 8-bit integers
  uint32_t candidates;   // of a head in halves: the number of tokens whose logits are exact; else 0
  uint32_t frequent;     // rows of frequent tokens
  uint32_t stride;       // 16-bit integers of one token's rounded activations
  uint32_t most_blocks;  // blocks of one token's rounded activations
  uint32_t longest;      // scores of one head
  float epsilon, scale, embedding_scale;
  struct layer *layer;   // (layers,)
  struct product embedding, lower, frequents, head;
  const float *norm;     // of the last norm
  const int32_t *frequent_ids;
  const float *shift;    // of a head in halves, (V,)
  uint8_t **pages;       // pages of the global layers' caches
  const int32_t *tokens; // (T,)
  const float *cosines[2], *sines[2]; // (T, H / 2) of each kind of layer
  float *x, *y;          // (T, D)
  float *wide;           // q, k, v (T, (N + 2 K) H), or gate and up (T, 2 F)
  float *attended;       // (T, N H), or the product of gate and up (T, F)
  float *scores;         // (threads, 4, longest)
  float *tile;           // (threads, TILE, H)
  float *logits;         // (V,)
  uint32_t *chosen;      // (V + 1,)
  struct rounded rounded;
  struct team *team;
};

// Positions of an 8-bit cache that are converted at a time.
#define TILE 16
// Steps of up to this many tokens read their own keys and values rounded (slm.core.contract.FEW_TOKENS).
#define FEW_TOKENS 16

// Rows of a product that a thread does together.
#define GROUP 8

INLINE float sum4(v128_t v) {
  v = wasm_f32x4_add(v, wasm_i32x4_shuffle(v, v, 2, 3, 0, 1));
  return wasm_f32x4_extract_lane(v, 0) + wasm_f32x4_extract_lane(v, 1);
}

INLINE uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }

// The part of `count` items, in groups of `group`, that a thread does: from `*from` to before `*to`.
INLINE void part(uint32_t count, uint32_t group, uint32_t thread, uint32_t threads, uint32_t *from, uint32_t *to) {
  uint32_t groups = (count + group - 1) / group;
  *from = least(count, groups * thread / threads * group);
  *to = least(count, groups * (thread + 1) / threads * group);
}

// round.c
void round_token(const struct product *p, const float *x, const struct rounded *to, uint32_t token, const struct model *m);
// products.c
void multiply(const struct product *p, const struct rounded *a, const float *x, uint32_t tokens, float *y, uint32_t stride,
              uint32_t from, uint32_t to, const struct model *m);
void look_up(const struct product *p, uint32_t row, float *to, float scale, int add);
// functions.c
void rms_norm(const float *x, const float *weight, float *to, uint32_t size, float epsilon);
void rotate(float *x, const float *cosine, const float *sine, uint32_t size);
void activate(uint32_t name, const float *gate, const float *up, float *to, uint32_t size);
float softmax(float *scores, uint32_t count);
// attention.c
void store_heads(const struct model *m, const struct layer *l, uint32_t past, uint32_t token, uint32_t head);
void attend(const struct model *m, const struct layer *l, uint32_t past, uint32_t tokens, uint32_t first, uint32_t thread,
            uint32_t threads);
// team.c
void barrier(struct team *team, uint32_t threads);
// step.c
void norm_tokens(const struct model *m, const float *update, const float *weight, const struct product *next, uint32_t from,
                 uint32_t to);
void forward(const struct model *m, uint32_t past, uint32_t tokens, uint32_t thread, uint32_t threads);
// head.c
void head(const struct model *m, const float *update, uint32_t token, uint32_t thread, uint32_t threads);
