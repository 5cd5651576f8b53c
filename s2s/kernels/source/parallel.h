/* Work in phases on XLA's own threads.

   Whoever calls does all of it alone if no other thread comes: a thread pool that is busy, or of
   one thread, costs time but never a deadlock. */

#ifndef S2S_PARALLEL_H
#define S2S_PARALLEL_H

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#include "xla/ffi/api/c_api.h"

#define MOST_WORKERS 64

/* Phase n, of size(n, argument) units of work that may run at the same time, after phase n - 1. From the
   second on, so many phases are a round, and the next does the same again. */
typedef struct {
  long count, round;
  long (*size)(long phase, const void *argument);
  void (*unit)(long phase, long number, void *argument);
  void *argument;
} Phases;

/* What is left of a worker's share of a phase: the phase, the end and the next unit, in one word, so
   that a thread that comes late cannot take a unit of a phase that is over. */
typedef struct {
  atomic_uint_fast64_t left;
  char apart[64 - sizeof(atomic_uint_fast64_t)];
} Share;

#define UNIT_BITS 20
#define MOST_UNITS ((1l << UNIT_BITS) - 1)
#define UNIT(word) ((long)((word) & MOST_UNITS))
#define END(word) UNIT((word) >> UNIT_BITS)
#define PHASE(word) ((long)((word) >> 2 * UNIT_BITS))

typedef struct {
  Phases phases;
  long workers;
  /* Units of this phase, and how many of them are taken at a time: with more than a word can count, several. */
  long size, each;
  atomic_long phase, undone, arrived, references;
  /* Worker w begins with units [size * w / workers, ...) of a phase: what it reads of a weight is then
     mostly in its cache from the last time. */
  Share share[MOST_WORKERS];
} Crew;

/* Deals out the first phase from this one on that has units. */
static void begin_phase(Crew *c, long phase) {
  long size = 0;
  while (phase < c->phases.count && !(size = c->phases.size(phase, c->phases.argument))) phase++;
  c->size = size, c->each = size / MOST_UNITS + 1;
  const long units = (size + c->each - 1) / c->each;
  atomic_store_explicit(&c->undone, units, memory_order_relaxed);
  for (long w = 0; units && w < c->workers; w++) {
    uint64_t first = units * w / c->workers, end = units * (w + 1) / c->workers;
    uint64_t word = (uint64_t)phase << 2 * UNIT_BITS | end << UNIT_BITS | first;
    atomic_store_explicit(&c->share[w].left, word, memory_order_release);
  }
  atomic_store_explicit(&c->phase, phase, memory_order_release);
}

/* One unit of a share, or as many as are taken at a time, if one is left. */
static int work_unit(Crew *c, Share *share, long phase) {
  uint64_t word = atomic_load_explicit(&share->left, memory_order_acquire);
  /* Every other round from the end: what was read last is still in the cache, and what was read first
     no more. */
  const long round = c->phases.round;
  const int from_end = (phase + round - 1) / round & 1;
  const uint64_t taken = from_end ? -((uint64_t)1 << UNIT_BITS) : 1;
  do
    if (PHASE(word) != phase || UNIT(word) == END(word)) return 0;
  while (!atomic_compare_exchange_weak_explicit(&share->left, &word, word + taken, memory_order_acq_rel,
                                                memory_order_acquire));
  const long first = (from_end ? END(word) - 1 : UNIT(word)) * c->each, end = first + c->each;
  for (long number = first; number < end && number < c->size; number++)
    c->phases.unit(phase, number, c->phases.argument);
  if (atomic_fetch_sub_explicit(&c->undone, 1, memory_order_acq_rel) == 1) begin_phase(c, phase + 1);
  return 1;
}

/* Until all phases are done; `me` is the share to begin with. */
static void work(Crew *c, long me) {
  for (long phase; (phase = atomic_load_explicit(&c->phase, memory_order_acquire)) < c->phases.count;) {
    for (long turn = 0; turn < c->workers; turn++)
      while (work_unit(c, &c->share[(me + turn) % c->workers], phase)) {
      }
    for (long waited = 0; atomic_load_explicit(&c->phase, memory_order_acquire) == phase; waited++)
      if (waited < 20000)
#ifdef __x86_64__
        __builtin_ia32_pause();
#else
        ;
#endif
      else
        sched_yield();
  }
}

static void let_go(Crew *c) {
  if (atomic_fetch_sub(&c->references, 1) == 1) free(c);
}

static void help(void *crew) {
  Crew *c = crew;
  work(c, atomic_fetch_add(&c->arrived, 1) % c->workers);
  let_go(c);
}

static long thread_count(const XLA_FFI_CallFrame *frame) {
  int64_t count = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL,
                                             frame->ctx, &count};
  XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_NumThreads(&args);
  if (error) {
    XLA_FFI_Error_Destroy_Args destroy = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
    frame->api->XLA_FFI_Error_Destroy(&destroy);
    return 1;
  }
  return count < 1 ? 1 : count > MOST_WORKERS ? MOST_WORKERS : count;
}

/* All phases, one after the other. */
static void run_phases(const XLA_FFI_CallFrame *frame, long workers, Phases phases) {
  Crew *c = aligned_alloc(64, (sizeof(Crew) + 63) / 64 * 64);
  c->phases = phases, c->workers = workers;
  atomic_init(&c->arrived, 1), atomic_init(&c->references, 1);
  begin_phase(c, 0);
  for (long w = 1; w < workers; w++) {
    XLA_FFI_ThreadPool_Schedule_Args args = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL,
                                             frame->ctx, help, c};
    atomic_fetch_add(&c->references, 1);
    XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_Schedule(&args);
    if (error) {
      XLA_FFI_Error_Destroy_Args destroy = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
      frame->api->XLA_FFI_Error_Destroy(&destroy);
      atomic_fetch_sub(&c->references, 1);
    }
  }
  work(c, 0);
  let_go(c);
}

#endif
