#include "describe.h"

#include <stdexcept>
#include <utility>

#include "lora.h"
#include "rows.h"

namespace torch_fused_lora {
namespace {

Operand contiguous(uint64_t rows, uint64_t cols) { return {rows, cols, rows, 0, cols, 1, 0}; }

template <typename Configuration>
std::string json(const Configuration& configuration) {
  std::string text;
  for (const auto& field : Configuration::fields) {
    text +=
        (text.empty() ? "\"" : ", \"") + std::string(field.name) + "\": " + std::to_string(configuration.*field.member);
  }
  return "{" + text + "}";
}

class Description {
 public:
  template <typename Problem>
  Description& add(const char* direction, const Problem& problem) {
    const auto planned = plan(problem);
    if (!planned.error.empty()) throw std::runtime_error(planned.error);
    const PartialSums& sums = planned.sums;
    uint64_t scratch = sizeof(float) * sums.splits * sums.elements;  // told once
    for (const auto& step : planned.steps)
      add(direction, step.launch, json(step.configuration), std::exchange(scratch, 0));
    if (sums.launch.kernel != nullptr) add(direction, sums.launch, "{}", 0);
    return *this;
  }

  std::string text() const { return "[" + text_ + "]"; }

 private:
  void add(const char* direction, const Launch& launch, const std::string& configuration, uint64_t scratch) {
    std::string groups, threads;
    for (int i = 0; i < 3; ++i) groups += (i ? ", " : "") + std::to_string(launch.threads[i] / launch.group[i]);
    text_ += std::string(text_.empty() ? "" : ", ") + "{\"direction\": \"" + direction + "\", \"kernel\": \"" +
        launch.kernel + "\", \"configuration\": " + configuration + ", \"threadgroups\": [" + groups +
        "], \"threads\": " + std::to_string(launch.group[0]) + ", \"scratch_bytes\": " + std::to_string(scratch) + "}";
  }

  std::string text_;
};

}  // namespace

std::string describe_lora(
    uint64_t M, uint64_t K, uint64_t N, uint64_t r, Scalar dtype, Scalar adapter_dtype, uint32_t gpu_cores) {
  const Operand x = contiguous(M, K), weight = contiguous(N, K), A = contiguous(r, K), B = contiguous(N, r),
                dy = contiguous(M, N);
  const auto delta = [&](Pass pass, const Operand& in, bool has_out) {
    return DeltaProblem{pass, dtype, adapter_dtype, in, A, B, has_out, true, 0, {}, gpu_cores};
  };
  const auto gemm = [&](Pass pass, const Operand& in, const Operand& factor) {
    return GemmProblem{pass, dtype, adapter_dtype, in, {weight}, factor, 0, false, 0.0, gpu_cores};
  };
  Description found;
  for (const bool backward : {false, true}) {
    const Tuned tuned({backward, M, K, N, r, dtype, adapter_dtype});
    if (by_torch(dtype, adapter_dtype, false)) continue;
    const bool inside = multiplies_plain(dtype);
    if (backward) {
      found.add("backward", delta(Pass::backward, dy, !inside))
          .add("backward", GradProblem{dtype, adapter_dtype, x, dy, r, true, true, {}, gpu_cores});
      if (inside) found.add("backward", gemm(Pass::backward, dy, A));
    } else if (decodes(M, r, true, false)) {
      found.add("forward", DecodeProblem{dtype, adapter_dtype, x, {weight}, A, B, 0, false, true, gpu_cores});
    } else {
      found.add("forward", delta(Pass::forward, x, !inside));
      if (inside) found.add("forward", gemm(Pass::forward, x, B));
    }
  }
  return found.text();
}

std::string describe_rms_norm(uint64_t M, uint64_t H, Scalar dtype, uint32_t gpu_cores) {
  const Operand x = contiguous(M, H);
  const NormWeight weight = {true, dtype, 0, 1};
  return Description()
      .add("forward", RmsNormProblem{dtype, x, weight, 0, gpu_cores})
      .add("backward", RmsNormBackwardProblem{dtype, x, x, weight, true, true, gpu_cores})
      .text();
}

std::string describe_softmax(uint64_t M, uint64_t H, Scalar dtype, uint32_t gpu_cores) {
  const Operand x = contiguous(M, H);
  return Description()
      .add("forward", SoftmaxProblem{dtype, x, gpu_cores})
      .add("backward", SoftmaxBackwardProblem{dtype, x, x, gpu_cores})
      .text();
}

}  // namespace torch_fused_lora
