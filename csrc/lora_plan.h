// The launch plan of the LoRA kernels: which one runs a problem, and with what grid, threads and arguments.
#pragma once

#include "launch.h"

namespace torch_fused_lora {

/// One LoRA layer on one GPU. x is M x K, weight N x K, lora_A r x K, lora_B N x r, y and dy M x N; h and z are M x r,
/// y, h, z and all gradients contiguous. The adapters are stacked along r: `ranks` of `adapters` entries, each dropped
/// with its own probability, which draws from the stream of its number. Of the GPU only its cores matter: all
/// arithmetic is float32, so that bfloat16, which GPUs before M3 emulate (public sources say), costs conversions alone.
struct Problem {
  Scalar dtype, adapter_dtype;
  Operand x, weight, lora_A, lora_B, dy;
  uint64_t y_offset, bias_stride;
  uint32_t has_bias, save_h, gpu_cores, adapters;
  const uint32_t* ranks;
  const double* dropout_p;  // null: no dropout
};

extern "C" {

// Each planning function returns null, or why the problem cannot be launched: a text that names the operand.
// `index` counts the dispatches of the problem from 0, of which there are `*count`; past the last one `*launch` is left
// alone.

/// y = x W^T + b + s (x A^T) B^T in one pass. Tensors: x, weight, bias, lora_A, lora_B, y, h, scaling.
const char* tfl_plan_decode(const Problem*, uint32_t index, Launch*, uint32_t* count);

/// y += s (drop(x) A^T) B^T, h where save_h. Tensors: x, lora_A, lora_B, y, h, scaling, seed.
const char* tfl_plan_delta(const Problem*, uint32_t index, Launch*, uint32_t* count);

/// dx += mask * s (dy B) A, z where save_h. The same kernel and tensors: dy, lora_B, lora_A, dx, z, scaling, seed;
/// y_offset is dx's. With `only_z` nothing but z is computed.
const char* tfl_plan_delta_dx(const Problem*, uint32_t only_z, uint32_t index, Launch*, uint32_t* count);

/// dA and dB, those asked for. Tensors: x, z, dy, h, dA, dB, scaling, seed. Where `*splits` > 1, dA and dB there are
/// float32 partial sums, with the split as a leading dimension, and the last dispatch is sum_splits with the tensors
/// partial dA, partial dB, dA, dB.
const char* tfl_plan_grad(
    const Problem*, uint32_t need_A, uint32_t need_B, uint32_t index, Launch*, uint32_t* count, uint32_t* splits);

/// Whether few enough rows are to be computed by lora_decode; otherwise torch's linear comes first, then lora_delta.
uint32_t tfl_decodes(const Problem*);
}

}  // namespace torch_fused_lora
