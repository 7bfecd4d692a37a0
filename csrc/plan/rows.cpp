#include "rows.h"

#include <algorithm>
#include <cstring>

#include "../../metal/rms_norm.h"
#include "../../metal/sizes.h"
#include "../../metal/softmax.h"
#include "planning.h"

extern const char rms_norm_source[], softmax_source[];  // metal/embed.py writes them

namespace torch_fused_lora {

using namespace tfl;  // what metal/ says

namespace {

constexpr uint32_t kRowSimdgroups = 8;       // of a row at most; longer rows are looped over
constexpr uint32_t kGroupSimdgroups = 16;    // of a threadgroup at most
constexpr uint32_t kLeastSimdgroups = 4;     // shorter rows share a threadgroup
constexpr uint32_t kCoreSimdgroups = 24;     // that walk over rows, each with a row on its way while it has another
constexpr uint32_t kBackwardSimdgroups = 8;  // the same of rms_norm_backward, whose threads take twice the registers
constexpr uint64_t kMostGroups = 1 << 20;  // keeps a grid's threads below 2**32

/// Threadgroups that have all rows at once; fewer walk over the rows.
uint64_t blocks(const Operand& x, const RowConfiguration& c) { return ceil_div(x.rows, c.rows); }

/// How rows lie in threadgroups of at least so many simdgroups, whose threads have so many runs of a row at a time: all
/// but the number of threadgroups.
RowConfiguration layout(const RowConfiguration& forced, const Operand& x, uint32_t runs, uint32_t least) {
  const auto pass = [&](uint32_t simdgroups) {
    return uint64_t{runs} * static_cast<uint32_t>(row_step(static_cast<short>(simdgroups)));
  };
  RowConfiguration c;
  c.row_simdgroups = 1;
  while (c.row_simdgroups < kRowSimdgroups && pass(c.row_simdgroups) < x.cols) c.row_simdgroups *= 2;
  c.row_simdgroups = unless(forced.row_simdgroups, c.row_simdgroups);
  c.rows = unless(forced.rows, std::max(least / c.row_simdgroups, 1u));
  c.rows = std::min(c.rows, kGroupSimdgroups / c.row_simdgroups);
  c.held = x.cols <= pass(c.row_simdgroups);
  return c;
}

uint32_t groups(
    const RowConfiguration& forced, const RowConfiguration& c, const Operand& x, uint64_t chosen, uint64_t least = 1) {
  const uint64_t all = blocks(x, c), walk = UINT32_MAX - all + 1;  // past the last block, a group's walk has to end
  return static_cast<uint32_t>(within(unless(forced.groups, chosen), least, std::min({all, kMostGroups, walk})));
}

/// Groups that walk over the rows, so many simdgroups on every core.
uint64_t walking(const RowConfiguration& c, uint32_t gpu_cores, uint32_t simdgroups) {
  return std::max<uint64_t>(gpu_cores * simdgroups / (c.row_simdgroups * c.rows), 1);
}

RowConfiguration choose(const RmsNormProblem& p) {
  const RowConfiguration& forced = overrides().rms_norm;
  RowConfiguration c = layout(forced, p.x, NORM_RUNS, kLeastSimdgroups);
  c.groups = groups(forced, c, p.x, walking(c, p.gpu_cores, kCoreSimdgroups));
  return c;
}

RowConfiguration choose(const RmsNormBackwardProblem& p) {
  const RowConfiguration& forced = overrides().rms_norm_backward;
  // A threadgroup adds up dweight over its rows: twice as many of them leave half the partial sums.
  RowConfiguration c = layout(forced, p.x, NORM_RUNS, 2 * kLeastSimdgroups);
  if (!c.held) c.rows = 1;  // the threadgroup's sums of dweight lie in memory, which one row at a time adds to
  // With dweight a group is a split, which writes H sums that are read once more. One that adds up in memory does so in
  // float32, in partial sums: two of them at least where the weight is narrower.
  const bool narrow = p.need_weight && !c.held && p.weight.dtype != Scalar::float32;
  const uint64_t least = narrow ? std::min<uint64_t>(2, p.x.rows) : 1;
  c.groups = groups(forced, c, p.x, walking(c, p.gpu_cores, kBackwardSimdgroups), least);
  return c;
}

/// Of a kernel that has every row in a place of its own.
RowConfiguration choose(const RowConfiguration& forced, const Operand& x, uint32_t runs) {
  RowConfiguration c = layout(forced, x, runs, kLeastSimdgroups);
  c.groups = groups(forced, c, x, blocks(x, c));
  return c;
}

void assemble(Variant variant, const char* text, const RowConfiguration& c, bool all_wide, Launch& launch) {
  variant.add(c.row_simdgroups)
      .add(c.rows)
      .add(c.held ? "true" : "false", c.held ? "held" : "looped")
      .add(all_wide ? "true" : "false", all_wide ? "wide" : "any")
      .assemble(text, launch);
  set_grid(launch, LANES * c.row_simdgroups * c.rows, c.groups);
}

bool is_empty(const Operand& x) { return x.rows == 0 || x.cols == 0; }

/// Whether rows are made of whole runs, which are contiguous and aligned to 16 bytes. A result's always are if an
/// operand's may be.
bool wide(const Operand& m, Scalar dtype) { return m.cols % RUN == 0 && m.col_stride == 1 && aligned(m, dtype); }

std::string check(std::initializer_list<Named> operands) {
  const auto& [name, first] = *operands.begin();
  const std::string error = too_large(operands);
  return error.empty() && first.cols > INT32_MAX ? std::string(name) + ": a row of 2**31 elements or more" : error;
}

// -------------------------------------------------------------------------------------------------------- rms_norm

std::string check(const NormWeight& weight) {
  return weight.stride > UINT32_MAX ? "weight: a stride of 2**32 elements or more" : "";
}

bool wide(const NormWeight& weight) {
  return !weight.given || (weight.stride == 1 && weight.offset % wide_elements(weight.dtype) == 0);
}

}  // namespace

Plan<RowConfiguration> plan(const RmsNormProblem& p) {
  Plan<RowConfiguration> plan = {check({{"x", p.x}})};
  if (plan.error.empty()) plan.error = check(p.weight);
  if (!plan.error.empty() || is_empty(p.x)) return plan;
  auto& [launch, c] = plan.steps.emplace_back();
  c = choose(p);
  assemble(
      Variant("rms_norm").add(msl(p.dtype)).add(msl(p.weight.dtype)), rms_norm_source, c,
      wide(p.x, p.dtype) && wide(p.weight), launch);
  const float eps = static_cast<float>(p.eps);
  uint32_t eps_bits;
  std::memcpy(&eps_bits, &eps, sizeof eps_bits);
  set_arguments(
      launch,
      {{NORM_M_H, pair(p.x.rows, p.x.cols)},
       {NORM_BLOCKS_FLAGS, pair(blocks(p.x, c), p.weight.given ? NORM_HAS_WEIGHT : 0)},
       {NORM_X_LEVELS, levels(p.x)},
       {NORM_X_STRIDES, strides(p.x)},
       {NORM_WEIGHT_STRIDE_EPS, pair(p.weight.stride, eps_bits)}});
  return plan;
}

Plan<RowConfiguration> plan(const RmsNormBackwardProblem& p) {
  Plan<RowConfiguration> plan = {check({{"x", p.x}, {"grad", p.grad}})};
  if (plan.error.empty()) plan.error = check(p.weight);
  if (!plan.error.empty() || is_empty(p.x)) return plan;
  auto& [launch, c] = plan.steps.emplace_back();
  c = choose(p);
  if (p.need_weight) plan.sums = plan_sums(p.weight.dtype, p.x.cols, 0, c.groups);
  const char* const type = msl(p.weight.dtype);
  assemble(
      Variant("rms_norm_backward").add(msl(p.dtype)).add(type).add(plan.sums.splits > 1 ? "float" : type),
      rms_norm_source, c, wide(p.x, p.dtype) && wide(p.grad, p.dtype) && wide(p.weight), launch);
  const uint32_t flags =
      (p.weight.given ? NORM_HAS_WEIGHT : 0) | (p.need_x ? NORM_NEED_X : 0) | (p.need_weight ? NORM_NEED_WEIGHT : 0);
  set_arguments(
      launch,
      {{NORM_BACKWARD_M_H, pair(p.x.rows, p.x.cols)},
       {NORM_BACKWARD_BLOCKS_FLAGS, pair(blocks(p.x, c), flags)},
       {NORM_BACKWARD_GRAD_LEVELS, levels(p.grad)},
       {NORM_BACKWARD_GRAD_STRIDES, strides(p.grad)},
       {NORM_BACKWARD_X_LEVELS, levels(p.x)},
       {NORM_BACKWARD_X_STRIDES, strides(p.x)},
       {NORM_BACKWARD_WEIGHT_STRIDE, pair(p.weight.stride, 0)}});
  return plan;
}

// --------------------------------------------------------------------------------------------------------- softmax

Plan<RowConfiguration> plan(const SoftmaxProblem& p) {
  Plan<RowConfiguration> plan = {check({{"x", p.x}})};
  if (!plan.error.empty() || is_empty(p.x)) return plan;
  auto& [launch, c] = plan.steps.emplace_back();
  c = choose(overrides().softmax, p.x, SOFTMAX_RUNS);
  assemble(Variant("softmax").add(msl(p.dtype)), softmax_source, c, wide(p.x, p.dtype), launch);
  set_arguments(
      launch,
      {{SOFTMAX_M_H, pair(p.x.rows, p.x.cols)},
       {SOFTMAX_BLOCKS, pair(blocks(p.x, c), 0)},
       {SOFTMAX_X_LEVELS, levels(p.x)},
       {SOFTMAX_X_STRIDES, strides(p.x)}});
  return plan;
}

Plan<RowConfiguration> plan(const SoftmaxBackwardProblem& p) {
  Plan<RowConfiguration> plan = {check({{"y", p.y}, {"grad", p.grad}})};
  if (!plan.error.empty() || is_empty(p.y)) return plan;
  auto& [launch, c] = plan.steps.emplace_back();
  c = choose(overrides().softmax_backward, p.y, SOFTMAX_BACKWARD_RUNS);
  assemble(
      Variant("softmax_backward").add(msl(p.dtype)), softmax_source, c, wide(p.y, p.dtype) && wide(p.grad, p.dtype),
      launch);
  set_arguments(
      launch,
      {{SOFTMAX_BACKWARD_M_H, pair(p.y.rows, p.y.cols)},
       {SOFTMAX_BACKWARD_BLOCKS, pair(blocks(p.y, c), 0)},
       {SOFTMAX_BACKWARD_GRAD_LEVELS, levels(p.grad)},
       {SOFTMAX_BACKWARD_GRAD_STRIDES, strides(p.grad)},
       {SOFTMAX_BACKWARD_Y_LEVELS, levels(p.y)},
       {SOFTMAX_BACKWARD_Y_STRIDES, strides(p.y)}});
  return plan;
}

}  // namespace torch_fused_lora
