// How a kernel's source and arguments tell the format of a weight: metal/weights.h.
#pragma once

#include "lora.h"
#include "planning.h"

namespace torch_fused_lora {

inline void add_format(Variant& variant, const Weight& weight, Scalar dtype) {
  const std::string type = msl(weight.bits > 0 ? weight.scale_dtype : dtype), bits = std::to_string(weight.bits);
  if (weight.bits > 0) {
    variant.add("tfl::Affine<" + bits + ", " + type + ">", "affine" + bits + "_" + type);
  } else {
    variant.add("tfl::Plain<" + type + ">", "plain");
  }
}

inline tfl::Pair layout(const Weight& weight) {
  if (weight.bits == 0) return strides(weight.operand);
  uint32_t shift = 0;
  while ((weight.group_size >> shift) > 1) ++shift;
  return pair(weight.operand.cols * weight.bits / 32, shift);
}

}  // namespace torch_fused_lora
