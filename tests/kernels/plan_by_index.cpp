// The plans of csrc/plan/ as C functions, which ctypes can call: dispatch `index` of a problem in `*launch`, how many
// there are in `*count`, how many partial sums in `*splits`, and of how many elements. Each returns null, or the plan's
// error.
#include <stdexcept>

#include "../../csrc/plan/lora.h"
#include "../../csrc/plan/rows.h"

namespace torch_fused_lora {
namespace {

thread_local std::string error;

template <typename Problem>
const char* dispatch(
    const Problem& problem, uint32_t index, Launch* launch, uint32_t* count, uint32_t* splits, uint64_t* elements) {
  const auto planned = plan(problem);
  error = planned.error;
  if (!error.empty()) return error.c_str();
  const uint32_t steps = static_cast<uint32_t>(planned.steps.size());
  *splits = planned.sums.splits;
  *elements = planned.sums.elements;
  *count = steps + (planned.sums.launch.kernel != nullptr ? 1 : 0);
  if (index < *count) *launch = index < steps ? planned.steps[index].launch : planned.sums.launch;
  return nullptr;
}

}  // namespace
}  // namespace torch_fused_lora

using namespace torch_fused_lora;

#define TFL_BY_INDEX(NAME, PROBLEM)                                                                                    \
  const char* NAME(                                                                                                    \
      const PROBLEM* problem, uint32_t index, Launch* launch, uint32_t* count, uint32_t* splits, uint64_t* elements) { \
    return dispatch(*problem, index, launch, count, splits, elements);                                                 \
  }

extern "C" {
TFL_BY_INDEX(plan_decode, DecodeProblem)
TFL_BY_INDEX(plan_delta, DeltaProblem)
TFL_BY_INDEX(plan_gemm, GemmProblem)
TFL_BY_INDEX(plan_grad, GradProblem)
TFL_BY_INDEX(plan_rms_norm, RmsNormProblem)
TFL_BY_INDEX(plan_rms_norm_backward, RmsNormBackwardProblem)
TFL_BY_INDEX(plan_softmax, SoftmaxProblem)
TFL_BY_INDEX(plan_softmax_backward, SoftmaxBackwardProblem)

/// Null, or what is wrong with the text.
const char* override_plans(const char* text) {
  try {
    set_overrides(text);
  } catch (const std::invalid_argument& refusal) {
    error = refusal.what();
    return error.c_str();
  }
  return nullptr;
}
}
