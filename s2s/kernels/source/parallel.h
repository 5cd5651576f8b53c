/* Work in two phases on XLA's own threads.

   Whoever calls does all of it alone if no other thread comes: a thread pool that is busy, or of
   one thread, costs time but never a deadlock. */

#ifndef S2S_PARALLEL_H
#define S2S_PARALLEL_H

#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "xla/ffi/api/c_api.h"

#define MOST_WORKERS 64

typedef struct {
  /* A unit of work: number, and what `run_phases` was given. */
  void (*first)(long number, void *argument);
  void (*second)(long number, void *argument);
  void *argument;
  long firsts, seconds, workers;
  atomic_long next_first, done_first, done_second, arrived, references;
  /* Of the second phase, worker w begins with units [seconds * w / workers, ...), always the same
     ones, so that what it reads of a weight is still in its cache at the next call. */
  struct {
    atomic_long next;
    char apart[64 - sizeof(atomic_long)];
  } share[MOST_WORKERS];
} Phases;

static void wait_for(atomic_long *count, long wanted) {
  for (long spins = 0; atomic_load_explicit(count, memory_order_acquire) < wanted; spins++) {
    if (spins < 20000)
#ifdef __x86_64__
      __builtin_ia32_pause();
#else
      ;
#endif
    else
      sched_yield();
  }
}

static long share_start(const Phases *p, long worker) { return p->seconds * worker / p->workers; }

static void work(Phases *p) {
  long me = atomic_fetch_add(&p->arrived, 1);
  int waited = 0;
  if (me >= p->workers) return;
  for (long n; (n = atomic_fetch_add(&p->next_first, 1)) < p->firsts;) {
    p->first(n, p->argument);
    atomic_fetch_add_explicit(&p->done_first, 1, memory_order_release);
  }
  for (long turn = 0; turn < p->workers; turn++) {
    long whose = (me + turn) % p->workers, end = share_start(p, whose + 1);
    if (atomic_load_explicit(&p->share[whose].next, memory_order_relaxed) >= end) continue;
    for (long n; (n = atomic_fetch_add(&p->share[whose].next, 1)) < end;) {
      if (!waited) wait_for(&p->done_first, p->firsts);
      waited = 1;
      p->second(n, p->argument);
      atomic_fetch_add_explicit(&p->done_second, 1, memory_order_release);
    }
  }
}

static void let_go(Phases *p) {
  if (atomic_fetch_sub(&p->references, 1) == 1) free(p);
}

static void help(void *phases) {
  work(phases);
  let_go(phases);
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

/* Runs first(0 .. firsts - 1), and then, when all of them are done, second(0 .. seconds - 1). */
static void run_phases(const XLA_FFI_CallFrame *frame, long workers, long firsts,
                       void (*first)(long, void *), long seconds, void (*second)(long, void *),
                       void *argument) {
  Phases *p = aligned_alloc(64, (sizeof(Phases) + 63) / 64 * 64);
  p->first = first, p->second = second, p->argument = argument;
  p->firsts = firsts, p->seconds = seconds, p->workers = workers;
  atomic_init(&p->next_first, 0), atomic_init(&p->done_first, 0), atomic_init(&p->done_second, 0);
  atomic_init(&p->arrived, 0), atomic_init(&p->references, 1);
  for (long w = 0; w < workers; w++) atomic_init(&p->share[w].next, share_start(p, w));
  for (long w = 1; w < workers; w++) {
    XLA_FFI_ThreadPool_Schedule_Args args = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL,
                                             frame->ctx, help, p};
    atomic_fetch_add(&p->references, 1);
    XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_Schedule(&args);
    if (error) {
      XLA_FFI_Error_Destroy_Args destroy = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
      frame->api->XLA_FFI_Error_Destroy(&destroy);
      atomic_fetch_sub(&p->references, 1);
    }
  }
  work(p);
  wait_for(&p->done_first, firsts);
  wait_for(&p->done_second, seconds);
  let_go(p);
}

#endif
