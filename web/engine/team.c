// Threads that run a step together. Each has its own instance of the module, and all share the memory.
#include "engine.h"

struct team {
  uint32_t job;      // counts the steps; threads wait for the next one
  uint32_t sleeping; // threads that wait for a step or at a barrier without spinning
  uint32_t arrived;  // threads that have reached the barrier
  uint32_t passed;   // counts the barriers
  uint32_t threads;  // of the current step
  uint32_t past, tokens;
};

// Loops before a thread sleeps: some tens of microseconds, which is longer than a part of a step.
#define SPINS 20000

#define LOAD(x) __atomic_load_n(&(x), __ATOMIC_SEQ_CST)
#define STORE(x, value) __atomic_store_n(&(x), value, __ATOMIC_SEQ_CST)
#define ADD(x, value) __atomic_fetch_add(&(x), value, __ATOMIC_SEQ_CST)

// Waits until a counter has another value than `old`.
static void wait_for(struct team *team, uint32_t *counter, uint32_t old) {
  for (uint32_t i = 0; i < SPINS; i++) {
    if (LOAD(*counter) != old) return;
  }
  ADD(team->sleeping, 1);
  while (LOAD(*counter) == old) __builtin_wasm_memory_atomic_wait32((int *)counter, (int)old, -1);
  ADD(team->sleeping, -1);
}

static void advance(struct team *team, uint32_t *counter) {
  ADD(*counter, 1);
  if (LOAD(team->sleeping)) __builtin_wasm_memory_atomic_notify((int *)counter, 0xffffffff);
}

// Waits until all threads of a step have come here.
void barrier(struct team *team, uint32_t threads) {
  if (threads < 2) return;
  uint32_t passed = LOAD(team->passed);
  if (ADD(team->arrived, 1) + 1 < threads) return wait_for(team, &team->passed, passed);
  STORE(team->arrived, 0);
  advance(team, &team->passed);
}

// Reads tokens after `past` others, with a number of threads, of which the caller is the first.
EXPORT("step") void step(struct model *m, uint32_t past, uint32_t tokens, uint32_t threads) {
  struct team *team = m->team;
  if (threads > 1) {
    team->past = past;
    team->tokens = tokens;
    team->threads = threads;
    advance(team, &team->job);
  }
  forward(m, past, tokens, 0, threads);
}

// Takes part in steps; never returns. The page ends the thread with its worker.
EXPORT("join") void join(struct model *m, uint32_t thread) {
  struct team *team = m->team;
  for (uint32_t job = 0;;) {
    wait_for(team, &team->job, job);
    job = LOAD(team->job);
    forward(m, team->past, team->tokens, thread, team->threads);
  }
}

EXPORT("sizes") uint32_t sizes(uint32_t of) {
  return of == 0 ? sizeof(struct model) : of == 1 ? sizeof(struct layer) : sizeof(struct team);
}
