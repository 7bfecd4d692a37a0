#include "interface.h"

#include <string>

#include "../plan/configuration.h"
#include "../plan/describe.h"
#include "kernels.h"
#include "tensors.h"

#define TFL_TEXT(x) #x
#define TFL_TEXT_OF(x) TFL_TEXT(x)
const char* tfl_interface() { return "torch_fused_lora interface 5 version " TFL_TEXT_OF(TFL_VERSION); }

namespace {

/// Null, or what the call refuses with.
template <typename Call>
const char* refusal_of(const Call& call) {
  thread_local std::string error;
  try {
    call();
  } catch (const std::invalid_argument& refusal) {
    error = refusal.what();
    return error.c_str();
  }
  return nullptr;
}

}  // namespace

const char* tfl_configure(uint32_t gpu_cores, const char* platform, const char* overrides) {
  torch_fused_lora::configure(gpu_cores, platform);
  return refusal_of([&] { torch_fused_lora::set_overrides(overrides); });
}

const char* tfl_candidates() {
  static const std::string text = torch_fused_lora::candidates();
  return text.c_str();
}

const char* tfl_tune(
    int32_t backward, const uint64_t* shape, int32_t dtype, int32_t adapter_dtype, const char* overrides) {
  using namespace torch_fused_lora;
  const Layer layer = {backward != 0,
                       shape[0],
                       shape[1],
                       shape[2],
                       shape[3],
                       static_cast<Scalar>(dtype),
                       static_cast<Scalar>(adapter_dtype)};
  return refusal_of([&] { tune(layer, overrides); });
}

uint64_t tfl_compiled_kernels() { return torch_fused_lora::compiled_so_far().kernels; }

double tfl_compile_seconds() { return torch_fused_lora::compiled_so_far().seconds; }

uint64_t tfl_contiguous_copies() { return torch_fused_lora::contiguous_copies(); }

const char* tfl_describe(
    const char* operation, const uint64_t* shape, int32_t dtype, int32_t adapter_dtype, uint32_t gpu_cores) {
  using namespace torch_fused_lora;
  thread_local std::string text;
  const uint32_t cores = gpu_cores > 0 ? gpu_cores : torch_fused_lora::gpu_cores();
  const auto scalar = static_cast<Scalar>(dtype);
  const std::string name = operation;
  try {
    text = name == "rms_norm" ? describe_rms_norm(shape[0], shape[1], scalar, cores)
        : name == "softmax"
        ? describe_softmax(shape[0], shape[1], scalar, cores)
        : describe_lora(shape[0], shape[1], shape[2], shape[3], scalar, static_cast<Scalar>(adapter_dtype), cores);
  } catch (const std::runtime_error& refusal) {
    text = std::string("{\"error\": \"") + refusal.what() + "\"}";
  }
  return text.c_str();
}
