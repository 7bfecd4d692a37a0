#include "row_plan.h"

#include <algorithm>
#include <cstring>

#include "../metal/rms_norm.h"
#include "../metal/sizes.h"
#include "../metal/softmax.h"
#include "planning.h"

// metal/, each family with its headers inlined: csrc/embed_metal.py writes them when the extension is built.
extern const char rms_norm_source[], softmax_source[];

namespace torch_fused_lora {

using namespace tfl;  // what metal/ says

namespace {

constexpr uint32_t kRowSimdgroups = 16;    // at most; longer rows are looped over
constexpr uint32_t kGroupSimdgroups = 8;   // at least; shorter rows share a threadgroup
constexpr uint32_t kCoreSimdgroups = 32;   // that keep a core's loads in flight; not timed
constexpr uint32_t kSplitRows = 16;        // at least, of each partial sum of dweight; not timed
constexpr uint64_t kMostGroups = 1 << 20;  // keeps a grid's threads below 2**32

/// How the rows of a problem lie in threadgroups.
struct Layout {
  uint64_t M, H, blocks;  // blocks of the rows that a group has at once
  uint32_t row_simdgroups, group_simdgroups;
  bool held;

  explicit Layout(const Operand& x) : M(x.rows), H(x.cols), row_simdgroups(1) {
    while (row_simdgroups < kRowSimdgroups && step() < H) row_simdgroups *= 2;
    group_simdgroups = std::max(row_simdgroups, kGroupSimdgroups);
    held = H <= step();
    blocks = ceil_div(M, group_simdgroups / row_simdgroups);
  }

  /// Elements of a row that its simdgroups have at a time.
  uint64_t step() const { return static_cast<uint64_t>(row_step(static_cast<short>(row_simdgroups))); }

  /// One dispatch, or none where there are no elements.
  uint32_t launches() const { return M > 0 && H > 0 ? 1 : 0; }

  /// Groups that fill the GPU and walk over the blocks, where walking saves bytes.
  uint64_t walking_groups(uint32_t gpu_cores) const {
    return std::min<uint64_t>(blocks, std::max<uint64_t>(gpu_cores * kCoreSimdgroups / group_simdgroups, 1));
  }

  void assemble(Variant variant, const char* text, uint64_t groups, Launch* launch) const {
    variant.add(row_simdgroups)
        .add(group_simdgroups / row_simdgroups)
        .add(held ? "true" : "false", held ? "held" : "looped")
        .assemble(text, *launch);
    set_grid(*launch, 32 * group_simdgroups, groups);
  }
};

const char* check(const RowProblem& problem) {
  if (const char* error = check(problem.x, "x: a dimension or stride of 2**32 elements or more")) return error;
  if (const char* error = check(problem.grad, "grad: a dimension or stride of 2**32 elements or more")) return error;
  if (problem.x.cols > INT32_MAX) return "x: a row of 2**31 elements or more";
  return problem.weight_stride > UINT32_MAX ? "weight: a stride of 2**32 elements or more" : nullptr;
}

bool wide(const Operand& m, Scalar dtype) { return m.col_stride == 1 && aligned(m, dtype); }

// -------------------------------------------------------------------------------------------------------- rms_norm

Scalar weight_type(const RowProblem& problem) { return problem.has_weight ? problem.weight_dtype : problem.dtype; }

/// The flags that forward and backward share.
uint32_t norm_flags(const RowProblem& problem) {
  uint32_t flags = problem.has_weight ? NORM_HAS_WEIGHT : 0;
  const bool weight_is_aligned = problem.weight_offset % wide_elements(problem.weight_dtype) == 0;
  if (problem.weight_stride == 1 && weight_is_aligned) flags |= NORM_WIDE_WEIGHT;
  if (wide(problem.x, problem.dtype)) flags |= NORM_WIDE_X;
  if (problem.x.cols % wide_elements(problem.dtype) == 0) flags |= NORM_WIDE_OUT;
  return flags;
}

}  // namespace

const char* tfl_plan_rms_norm(
    const RowProblem* problem, double eps, uint32_t index, Launch* launch, uint32_t* count) {
  if (const char* error = check(*problem)) return error;
  const Layout layout(problem->x);
  *count = layout.launches();
  if (index >= *count) return nullptr;

  const float eps_value = static_cast<float>(eps);
  uint32_t eps_bits;
  std::memcpy(&eps_bits, &eps_value, sizeof eps_bits);
  layout.assemble(
      Variant("rms_norm").add(msl(problem->dtype)).add(msl(weight_type(*problem))), rms_norm_source,
      layout.walking_groups(problem->gpu_cores), launch);
  set_arguments(
      *launch,
      {{NORM_M_H, pack(layout.M, layout.H)},
       {NORM_BLOCKS_FLAGS, pack(layout.blocks, norm_flags(*problem))},
       {NORM_X_LEVELS, levels(problem->x)},
       {NORM_X_STRIDES, strides(problem->x)},
       {NORM_WEIGHT_STRIDE_EPS, pack(problem->weight_stride, eps_bits)}});
  return nullptr;
}

const char* tfl_plan_rms_norm_backward(
    const RowProblem* problem, uint32_t need_x, uint32_t need_weight, uint32_t index, Launch* launch, uint32_t* count,
    uint32_t* splits) {
  if (const char* error = check(*problem)) return error;
  const Layout layout(problem->x);
  // With dweight a group is a split, which writes H sums that are read once more: it has some rows to itself. One that
  // adds up in memory does so in float32, in partial sums: two of them at least where the weight is narrower.
  uint64_t groups = layout.walking_groups(problem->gpu_cores);
  if (need_weight) {
    const uint64_t least = layout.held || problem->weight_dtype == Scalar::float32 ? 1 : 2;
    groups = std::min(groups, std::max(ceil_div(layout.M, kSplitRows), std::min(least, layout.M)));
  }
  *splits = need_weight ? static_cast<uint32_t>(std::max<uint64_t>(groups, 1)) : 1;
  *count = layout.launches() * (*splits > 1 ? 2 : 1);

  if (index == 0 && *count > 0) {
    const char* const out = *splits > 1 ? "float" : msl(weight_type(*problem));
    const uint32_t flags = norm_flags(*problem) | (wide(problem->grad, problem->dtype) ? NORM_WIDE_GRAD : 0) |
        (need_x ? NORM_NEED_X : 0) | (need_weight ? NORM_NEED_WEIGHT : 0);
    layout.assemble(
        Variant("rms_norm_backward").add(msl(problem->dtype)).add(msl(weight_type(*problem))).add(out),
        rms_norm_source, groups, launch);
    set_arguments(
        *launch,
        {{NORM_BACKWARD_M_H, pack(layout.M, layout.H)},
         {NORM_BACKWARD_BLOCKS_FLAGS, pack(layout.blocks, flags)},
         {NORM_BACKWARD_GRAD_LEVELS, levels(problem->grad)},
         {NORM_BACKWARD_GRAD_STRIDES, strides(problem->grad)},
         {NORM_BACKWARD_X_LEVELS, levels(problem->x)},
         {NORM_BACKWARD_X_STRIDES, strides(problem->x)},
         {NORM_BACKWARD_WEIGHT_STRIDE, pack(problem->weight_stride, 0)}});
  } else if (index < *count) {
    plan_sum(problem->weight_dtype, layout.H, 0, *splits, launch);
  }
  return nullptr;
}

// --------------------------------------------------------------------------------------------------------- softmax

namespace {

const char* plan_softmax(
    const RowProblem& problem, bool backward, uint32_t index, Launch* launch, uint32_t* count) {
  if (const char* error = check(problem)) return error;
  const Layout layout(problem.x);
  *count = layout.launches();
  if (index >= *count) return nullptr;
  const uint32_t flags = (wide(problem.x, problem.dtype) ? SOFTMAX_WIDE_X : 0) |
      (wide(problem.grad, problem.dtype) ? SOFTMAX_WIDE_GRAD : 0) |
      (problem.x.cols % wide_elements(problem.dtype) == 0 ? SOFTMAX_WIDE_OUT : 0);
  const Variant variant = Variant(backward ? "softmax_backward" : "softmax").add(msl(problem.dtype));
  layout.assemble(variant, softmax_source, std::min(layout.blocks, kMostGroups), launch);
  const uint64_t shape = pack(layout.M, layout.H), blocks = pack(layout.blocks, flags);
  const Operand &x = problem.x, &grad = problem.grad;
  if (backward) {
    set_arguments(
        *launch,
        {{SOFTMAX_BACKWARD_M_H, shape},
         {SOFTMAX_BACKWARD_BLOCKS_FLAGS, blocks},
         {SOFTMAX_BACKWARD_GRAD_LEVELS, levels(grad)},
         {SOFTMAX_BACKWARD_GRAD_STRIDES, strides(grad)},
         {SOFTMAX_BACKWARD_Y_LEVELS, levels(x)},
         {SOFTMAX_BACKWARD_Y_STRIDES, strides(x)}});
  } else {
    set_arguments(
        *launch,
        {{SOFTMAX_M_H, shape},
         {SOFTMAX_BLOCKS_FLAGS, blocks},
         {SOFTMAX_X_LEVELS, levels(x)},
         {SOFTMAX_X_STRIDES, strides(x)}});
  }
  return nullptr;
}

}  // namespace

const char* tfl_plan_softmax(const RowProblem* problem, uint32_t index, Launch* launch, uint32_t* count) {
  return plan_softmax(*problem, false, index, launch, count);
}

const char* tfl_plan_softmax_backward(const RowProblem* problem, uint32_t index, Launch* launch, uint32_t* count) {
  return plan_softmax(*problem, true, index, launch, count);
}

}  // namespace torch_fused_lora
