/* What XLA asks of a handler and tells it, and memory that is kept between calls. */

#ifndef S2S_FFI_H
#define S2S_FFI_H

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "xla/ffi/api/c_api.h"

/* ---- what XLA asks of every handler ---- */

static int described(XLA_FFI_CallFrame *frame) {
  for (XLA_FFI_Extension_Base *e = frame->extension_start; e; e = e->next)
    if (e->type == XLA_FFI_Extension_Metadata) {
      XLA_FFI_Metadata *m = ((XLA_FFI_Metadata_Extension *)e)->metadata;
      m->api_version.major_version = XLA_FFI_API_MAJOR;
      m->api_version.minor_version = XLA_FFI_API_MINOR;
      m->traits = 0;
      return 1;
    }
  return 0;
}

static XLA_FFI_Buffer *argument(XLA_FFI_CallFrame *frame, int n) { return frame->args.args[n]; }
static XLA_FFI_Buffer *result(XLA_FFI_CallFrame *frame, int n) { return frame->rets.rets[n]; }

static int64_t attribute(XLA_FFI_CallFrame *frame, const char *name) {
  for (int64_t n = 0; n < frame->attrs.size; n++) {
    XLA_FFI_ByteSpan *span = frame->attrs.names[n];
    if (span->len == strlen(name) && !memcmp(span->ptr, name, span->len))
      return *(int64_t *)((XLA_FFI_Scalar *)frame->attrs.attrs[n])->value;
  }
  return 0;
}

/* ---- memory between calls ---- */

#define HUGE_PAGE (2l << 20)

/* Of the pages that lie in it completely. A panel spans several small pages, and to look them up
   takes long. */
static void ask_for_huge_pages(void *memory, size_t bytes) {
#ifdef __linux__
  uintptr_t from = ((uintptr_t)memory + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  uintptr_t to = ((uintptr_t)memory + bytes) / HUGE_PAGE * HUGE_PAGE;
  if (from < to) madvise((void *)from, to - from, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

#define SPACES 32
static struct {
  atomic_int busy;
  void *memory;
  size_t bytes;
} spaces[SPACES];

/* At least so many bytes, kept for the next call: fresh pages cost more than a small product. */
static void *borrow(size_t bytes, int *which) {
  for (int n = 0; n < SPACES; n++) {
    int free_ = 0;
    if (atomic_compare_exchange_strong(&spaces[n].busy, &free_, 1)) {
      if (spaces[n].bytes < bytes) {
        free(spaces[n].memory);
        spaces[n].bytes = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        spaces[n].memory = aligned_alloc(HUGE_PAGE, spaces[n].bytes);
        ask_for_huge_pages(spaces[n].memory, spaces[n].bytes);
      }
      *which = n;
      return spaces[n].memory;
    }
  }
  *which = -1;
  return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

static void give_back(void *memory, int which) {
  if (which < 0)
    free(memory);
  else
    atomic_store(&spaces[which].busy, 0);
}

#endif
