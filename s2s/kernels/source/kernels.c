/* XLA's custom calls on a CPU. Compiled on the machine that runs them. */

#include "decoder.h"
#include "lstm.h"
#include "product.h"
#include "softmax.h"
#include "survey.h"

/* An operand of a product, from a matrix that is summed over its axis `axis`. */
static Operand operand(const XLA_FFI_Buffer *x, long axis) {
  Operand o = {.data = x->data, .is_bfloat16 = x->dtype == XLA_FFI_DataType_BF16};
  o.count_k = x->dims[axis], o.count_i = x->dims[1 - axis];
  o.stride_k = axis ? 1 : x->dims[1], o.stride_i = axis ? x->dims[1] : 1;
  return o;
}

/* (left, right) -> their product; each summed over the axis that an attribute names. */
XLA_FFI_Error *s2s_product(XLA_FFI_CallFrame *frame) {
  if (described(frame)) return NULL;
  int parts = attribute(frame, "parts");
  Product p = {.left = packing_of(operand(argument(frame, 0), attribute(frame, "left_axis")), parts, 0),
               .right = packing_of(operand(argument(frame, 1), attribute(frame, "right_axis")), parts, 1)};
  multiply(frame, &p, result(frame, 0));
  return NULL;
}

/* (left [M, K], packed right) -> their product [M, N]. */
XLA_FFI_Error *s2s_stationary(XLA_FFI_CallFrame *frame) {
  if (described(frame)) return NULL;
  int parts = attribute(frame, "parts");
  Product p = {.left = packing_of(operand(argument(frame, 0), 1), parts, 0)};
  Operand right = {.count_i = result(frame, 0)->dims[1], .count_k = p.left.operand.count_k};
  p.right = packing_of(right, parts, 1);
  p.right.packed = argument(frame, 1)->data;
  multiply(frame, &p, result(frame, 0));
  return NULL;
}

static long pack_size(long phase, const void *packing) {
  (void)phase;
  return packing_units(packing);
}

static void pack_one(long phase, long number, void *packing) {
  (void)phase;
  pack_unit(packing, number);
}

/* right -> it, laid out for `s2s_stationary`. */
XLA_FFI_Error *s2s_pack(XLA_FFI_CallFrame *frame) {
  if (described(frame)) return NULL;
  Operand right = operand(argument(frame, 0), attribute(frame, "right_axis"));
  Packing p = packing_of(right, attribute(frame, "parts"), 1);
  p.packed = result(frame, 0)->data;
  ask_for_huge_pages(p.packed, packed_bytes(&p));
  run_phases(frame, thread_count(frame), (Phases){1, 1, pack_size, pack_one, &p});
  return NULL;
}

XLA_FFI_Error *s2s_lstm(XLA_FFI_CallFrame *frame) {
  if (!described(frame)) lstm_forward(frame);
  return NULL;
}

XLA_FFI_Error *s2s_lstm_back(XLA_FFI_CallFrame *frame) {
  if (!described(frame)) lstm_backward(frame);
  return NULL;
}

XLA_FFI_Error *s2s_decoder(XLA_FFI_CallFrame *frame) {
  if (!described(frame)) decoder_forward(frame);
  return NULL;
}

XLA_FFI_Error *s2s_decoder_step(XLA_FFI_CallFrame *frame) {
  if (!described(frame)) decoder_step(frame);
  return NULL;
}

XLA_FFI_Error *s2s_decoder_pack(XLA_FFI_CallFrame *frame) {
  if (!described(frame)) decoder_pack(frame);
  return NULL;
}

XLA_FFI_Error *s2s_decoder_back(XLA_FFI_CallFrame *frame) {
  if (!described(frame)) decoder_backward(frame);
  return NULL;
}

XLA_FFI_Error *s2s_softmax(XLA_FFI_CallFrame *frame) {
  if (!described(frame)) softmax(frame);
  return NULL;
}

XLA_FFI_Error *s2s_survey(XLA_FFI_CallFrame *frame) {
  if (!described(frame)) survey(frame);
  return NULL;
}

/* 1 where the matrix unit may be used. */
int s2s_has_matrix_unit(void) { return amx_allowed(); }

/* Of a vector of float32: with fewer than 16, XLA's own loops are as good. */
int s2s_lanes(void) { return LANES; }

/* Bytes of a packed operand [k, n]. */
int64_t s2s_packed_bytes(int64_t k, int64_t n, int parts) {
  Packing p = packing_of((Operand){.count_i = n, .count_k = k}, parts, 1);
  return packed_bytes(&p);
}

/* Bytes of a decoder's weights from `s2s_decoder_pack`. */
int64_t s2s_decoder_packed_bytes(int64_t hidden, int64_t memory, int64_t layers, int asks, int parts) {
  return decoder_packed_bytes(hidden, memory, layers, asks, parts);
}
