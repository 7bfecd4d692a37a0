// The launch plans of the LoRA kernels: which problem each of them takes, and how it is launched. x is M x K, weight
// N x K, lora_A r x K, lora_B N x r, y and dy M x N; h and z are M x r. y, h, z and all gradients are contiguous.
//
// Of the GPU only its cores matter: all arithmetic is float32, so that bfloat16, which GPUs before M3 emulate (public
// sources say), costs conversions alone.
#pragma once

#include "configuration.h"
#include "launch.h"

namespace torch_fused_lora {

/// Adapters stacked along r, each of its rank, dropped with its own probability, and drawing from the stream of its
/// number. No adapters: no dropout.
struct Dropout {
  uint32_t adapters;
  const uint32_t* ranks;
  const double* p;
};

/// Whether a layer is left to torch's own products, where they keep PEFT's numerics: by override alone.
inline bool by_torch(Scalar dtype, Scalar adapter_dtype, bool drops) {
  return overrides().lora_linear.way == 2 && dtype == adapter_dtype && !drops;
}

/// lora_decode: y = x W^T + b + s (x A^T) B^T in one pass, for at most DECODE_MAX_ROWS rows of x.
struct DecodeProblem {
  Scalar dtype, adapter_dtype;
  Operand x;
  Weight weight;
  Operand lora_A, lora_B;  // of no rank: none
  uint64_t bias_stride;
  bool has_bias, save_h;
  uint32_t gpu_cores;
};

/// Whether lora_decode takes a problem; otherwise torch's linear comes first, then lora_delta. `weight_in_rows`: its
/// rows are contiguous.
bool decodes(uint64_t M, uint64_t r, bool weight_in_rows, bool drops);

enum class Pass : int32_t { forward, backward };

/// lora_delta. Forward: y += s (drop(x) A^T) B^T, and h. Backward, with the operands in other roles: dx += mask * s
/// (dy B) A, and z; without dx, z alone.
struct DeltaProblem {
  Pass pass;
  Scalar dtype, adapter_dtype;
  Operand in, lora_A, lora_B;  // x or dy
  bool has_out, has_low_rank;  // results: y or dx; h or z
  uint64_t out_offset;
  Dropout dropout;
  uint32_t gpu_cores;
};

/// lora_gemm: y = x W^T + b + s h factor^T with factor = B; backward dx = dy W + mask * s h factor, with h = z and
/// factor = A; h is contiguous. A factor of no elements: there is neither. Only backward drops, one adapter's p.
struct GemmProblem {
  Pass pass;
  Scalar dtype, adapter_dtype;
  Operand in;  // x or dy
  Weight weight;
  Operand factor;
  uint64_t bias_stride;
  bool has_bias;
  double dropout_p;
  uint32_t gpu_cores;
};

/// Whether a weight of elements goes that way as well, rather than by torch's products: a half one, by override alone.
bool multiplies_plain(Scalar dtype);

/// lora_grad: dA = s z^T drop(x) and dB = s dy^T h, those asked for. Of x only the shape counts where dA is not. With
/// partial sums, dA and dB there are float32, with the split as a leading dimension.
struct GradProblem {
  Scalar dtype, adapter_dtype;
  Operand x, dy;
  uint64_t r;
  bool need_A, need_B;
  Dropout dropout;
  uint32_t gpu_cores;
};

Plan<DecodeConfiguration> plan(const DecodeProblem& problem);
Plan<DeltaConfiguration> plan(const DeltaProblem& problem);
Plan<GemmConfiguration> plan(const GemmProblem& problem);
Plan<GradConfiguration> plan(const GradProblem& problem);

}  // namespace torch_fused_lora
