// The head: the logits of one token.
#include "engine.h"

// The scales of lower halves are 1/16 of the stored ones.
#define LOWER (1.0f / 16)
// Logits below the largest by this much are no candidates; the range is searched in as many parts as BINS.
#define RANGE 64.0f
#define BINS 4096

// Finds at least `m->candidates` of the largest logits and writes their tokens; returns how many.
static uint32_t choose(const struct model *m) {
  uint32_t counts[BINS] = {0}, found = 0;
  float most = -1e30f;
  for (uint32_t i = 0; i < m->vocab; i++) most = m->logits[i] > most ? m->logits[i] : most;
  for (uint32_t i = 0; i < m->vocab; i++) {
    uint32_t bin = (uint32_t)((most - m->logits[i]) * (BINS / RANGE));
    if (bin < BINS) counts[bin]++;
  }
  uint32_t bins = 0;
  for (uint32_t sum = 0; bins < BINS && sum < m->candidates; bins++) sum += counts[bins];
  for (uint32_t i = 0; i < m->vocab; i++) {
    if ((most - m->logits[i]) * (BINS / RANGE) < (float)bins) m->chosen[found++] = i;
  }
  return found;
}

// Computes the logits of a token, whose residual stream first gets an update.
void head(const struct model *m, const float *update, uint32_t token, uint32_t thread, uint32_t threads) {
  uint32_t from, to;
  struct rounded rounded = m->rounded;
  float *x = m->y + (size_t)token * m->hidden, *exact = (float *)m->chosen;
  if (thread == 0) norm_tokens(m, update, m->norm, &m->head, token, token + 1);
  barrier(m->team, threads);
  rounded.wide += (size_t)token * m->stride;
  rounded.narrow = (int8_t *)rounded.wide;
  rounded.scales += token * m->most_blocks;
  rounded.sums += token * m->most_blocks;
  part(m->vocab, GROUP, thread, threads, &from, &to);
  multiply(&m->head, &rounded, x, 1, m->logits, m->vocab, from, to, m);
  barrier(m->team, threads);
  if (m->frequent) {
    if (thread == 0) round_token(&m->frequents, x, &m->rounded, token, m);
    barrier(m->team, threads);
    part(m->frequent, GROUP, thread, threads, &from, &to);
    multiply(&m->frequents, &rounded, x, 1, exact, m->frequent, from, to, m);
    for (; from < to; from++) m->logits[m->frequent_ids[from]] = exact[from];
    barrier(m->team, threads);
  }
  if (m->candidates) {
    for (uint32_t i = from; i < to; i++) m->logits[i] += m->shift[i];
    barrier(m->team, threads);
    if (thread == 0) m->chosen[m->vocab] = choose(m);
    barrier(m->team, threads);
    part(m->chosen[m->vocab], 1, thread, threads, &from, &to);
    for (; from < to; from++) {
      uint32_t id = m->chosen[from];
      float lower;
      multiply(&m->lower, &rounded, x, 1, &lower - id, 0, id, id + 1, m);
      m->logits[id] += lower * LOWER - m->shift[id];
    }
    barrier(m->team, threads);
  }
}
