#include "interface.h"

#include "../plan/configuration.h"
#include "kernels.h"
#include "tensors.h"

#define TFL_TEXT(x) #x
#define TFL_TEXT_OF(x) TFL_TEXT(x)
const char* tfl_interface() { return "torch_fused_lora interface 3 version " TFL_TEXT_OF(TFL_VERSION); }

const char* tfl_configure(uint32_t gpu_cores, const char* platform, const char* overrides) {
  static std::string error;
  torch_fused_lora::configure(gpu_cores, platform);
  try {
    torch_fused_lora::set_overrides(overrides);
  } catch (const std::invalid_argument& refusal) {
    error = refusal.what();
    return error.c_str();
  }
  return nullptr;
}

uint64_t tfl_compiled_kernels() { return torch_fused_lora::compiled_so_far().kernels; }

double tfl_compile_seconds() { return torch_fused_lora::compiled_so_far().seconds; }

uint64_t tfl_contiguous_copies() { return torch_fused_lora::contiguous_copies(); }
