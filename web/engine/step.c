// A step: embedding, layers, last norm and the head of the last token, as slm.export.graph writes them.
#include "engine.h"

// Norms the tokens of the residual stream, after it has got an update (the norm of `y`), and rounds them for a product.
void norm_tokens(const struct model *m, const float *update, const float *weight, const struct product *next, uint32_t from,
                 uint32_t to) {
  uint32_t size = m->hidden;
  for (uint32_t t = from; t < to; t++) {
    float *x = m->x + (size_t)t * size, *y = m->y + (size_t)t * size;
    if (update) {
      rms_norm(y, update, y, size, m->epsilon);
      for (uint32_t i = 0; i < size; i += 4) {
        wasm_v128_store(x + i, wasm_f32x4_add(wasm_v128_load(x + i), wasm_v128_load(y + i)));
      }
    }
    rms_norm(x, weight, y, size, m->epsilon);
    round_token(next, y, &m->rounded, t, m);
  }
}

static void embed(const struct model *m, uint32_t from, uint32_t to) {
  for (uint32_t t = from; t < to; t++) {
    float *x = m->x + (size_t)t * m->hidden;
    uint32_t id = (uint32_t)m->tokens[t], row = 0;
    while (row < m->frequent && (uint32_t)m->frequent_ids[row] != id) row++;
    if (row < m->frequent) {
      look_up(&m->frequents, row, x, m->embedding_scale, 0);
      continue;
    }
    look_up(&m->embedding, id, x, m->embedding_scale, 0);
    if (m->candidates) look_up(&m->lower, id, x, m->embedding_scale / 16, 1);
  }
}

// Does a thread's part of a step. Between parts that read each other's results is a barrier.
void forward(const struct model *m, uint32_t past, uint32_t tokens, uint32_t thread, uint32_t threads) {
  uint32_t from, to, first = 0; // tokens before `first` are not needed any more
  uint32_t joint = (m->heads + 2 * m->kv_heads) * m->head_dim, width = m->heads * m->head_dim;
  const float *update = 0;
#define TOKENS part(tokens - first, 1, thread, threads, &from, &to), from += first, to += first
#define ALL_REACH_THIS barrier(m->team, threads)
#define PRODUCT(p, x, y, stride, begin, end)                                                                               \
  multiply(p, &rounded, (x) + (size_t)first * (p)->inputs, tokens - first, (y) + (size_t)first * (stride), stride, begin, end, m)
  TOKENS;
  embed(m, from, to);
  for (uint32_t i = 0; i < m->layers; i++) {
    const struct layer *l = m->layer + i;
    struct rounded rounded = m->rounded;
    norm_tokens(m, update, l->input_norm, &l->qkv, from, to);
    ALL_REACH_THIS;
    part(joint, GROUP, thread, threads, &from, &to);
    PRODUCT(&l->qkv, m->y, m->wide, joint, from, to);
    ALL_REACH_THIS;
    uint32_t heads = m->heads + m->kv_heads;
    part(tokens * heads, 1, thread, threads, &from, &to);
    for (; from < to; from++) store_heads(m, l, past, from / heads, from % heads);
    ALL_REACH_THIS;
    if (i + 1 == m->layers) { // only the last token has logits
      first = tokens - 1;
      rounded.wide += (size_t)first * m->stride;
      rounded.narrow = (int8_t *)rounded.wide;
      rounded.scales += first * m->most_blocks;
      rounded.sums += first * m->most_blocks;
    }
    attend(m, l, past, tokens, first, thread, threads);
    ALL_REACH_THIS;
    TOKENS;
    for (uint32_t t = from; t < to; t++) round_token(&l->o, m->attended + (size_t)t * width, &m->rounded, t, m);
    ALL_REACH_THIS;
    part(m->hidden, GROUP, thread, threads, &from, &to);
    PRODUCT(&l->o, m->attended, m->y, m->hidden, from, to);
    ALL_REACH_THIS;
    TOKENS;
    norm_tokens(m, l->attention_norm, l->mlp_norm, &l->gate_up, from, to);
    ALL_REACH_THIS;
    part(m->inner, GROUP, thread, threads, &from, &to);
    PRODUCT(&l->gate_up, m->y, m->wide, 2 * m->inner, from, to);
    PRODUCT(&l->gate_up, m->y, m->wide, 2 * m->inner, m->inner + from, m->inner + to);
    for (uint32_t t = first; t < tokens; t++) {
      const float *gate = m->wide + (size_t)t * 2 * m->inner;
      activate(m->activation, gate + from, gate + m->inner + from, m->attended + (size_t)t * m->inner + from, to - from);
    }
    ALL_REACH_THIS;
    TOKENS;
    for (uint32_t t = from; t < to; t++) round_token(&l->down, m->attended + (size_t)t * m->inner, &m->rounded, t, m);
    ALL_REACH_THIS;
    part(m->hidden, GROUP, thread, threads, &from, &to);
    PRODUCT(&l->down, m->attended, m->y, m->hidden, from, to);
    ALL_REACH_THIS;
    TOKENS;
    update = l->output_norm;
  }
  head(m, update, tokens - 1, thread, threads);
}
