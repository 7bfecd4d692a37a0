#include "../../metal/lora_gemm.h"

#include <algorithm>

#include "dropout.h"
#include "lora.h"
#include "planning.h"

extern const char lora_gemm_source[];  // metal/embed.py writes it

namespace torch_fused_lora {

using namespace tfl;  // what metal/ says

namespace {

constexpr uint64_t kMostSplits = 16;
constexpr uint64_t kLeastTerms = 512;  // of a split: the sums of shorter ones cost more than they save

/// Threadgroups that a core has room for, by the registers that the sums and loaders take.
uint64_t groups_a_core(Pass pass, const GemmConfiguration& c) { return pass == Pass::forward && c.rows == 32 ? 4 : 3; }

GemmConfiguration choose(const GemmProblem& p, uint64_t columns, uint64_t terms) {
  const GemmConfiguration& forced = overrides().lora_gemm;
  GemmConfiguration c = {.plain = forced.plain};
  // Half the rows where the tiles would not fill the GPU twice, or have no more rows.
  const auto tiles = [&](uint64_t rows) { return ceil_div(p.in.rows, rows) * ceil_div(columns, GEMM_COLUMNS); };
  c.rows = unless(forced.rows, p.in.rows <= 32 || tiles(64) < 2 * p.gpu_cores ? 32 : 64);
  // As many threadgroups as the GPU has room for at once: what the tiles leave free, the terms fill.
  const uint64_t room = groups_a_core(p.pass, c) * p.gpu_cores / std::max<uint64_t>(tiles(c.rows), 1);
  const uint64_t splits = std::min<uint64_t>(unless(forced.splits, std::min(room, terms / kLeastTerms)), kMostSplits);
  c.terms = static_cast<uint32_t>(ceil_div(ceil_div(terms, std::max<uint64_t>(splits, 1)), GEMM_DEPTH) * GEMM_DEPTH);
  c.splits = static_cast<uint32_t>(std::max<uint64_t>(ceil_div(terms, std::max(c.terms, 1u)), 1));
  return c;
}

}  // namespace

bool multiplies_plain(Scalar dtype) { return overrides().lora_gemm.plain > 0 && dtype != Scalar::float32; }

Plan<GemmConfiguration> plan(const GemmProblem& p) {
  const bool is_forward = p.pass == Pass::forward;
  const Operand& W = p.weight.operand;
  Plan<GemmConfiguration> plan = {too_large(
      {{is_forward ? "x" : "dy", p.in},
       {"weight", W},
       {is_forward ? "lora_B" : "lora_A", p.factor},
       {"bias", bias_of(p.bias_stride)}})};
  if (!plan.error.empty()) return plan;
  const uint64_t terms = is_forward ? W.cols : W.rows, columns = is_forward ? W.rows : W.cols;
  auto& [launch, c] = plan.steps.emplace_back();
  c = choose(p, columns, terms);
  const Scalar written = c.splits > 1 ? Scalar::float32 : p.dtype;
  Variant variant("lora_gemm");
  variant.add(msl(p.dtype)).add(msl(p.adapter_dtype)).add(msl(written));
  add_format(variant, p.weight, p.dtype);
  variant.add(c.rows)
      .add(is_forward ? "false" : "true", is_forward ? "forward" : "backward")
      .add(p.dropout_p > 0 ? "true" : "false", p.dropout_p > 0 ? "drop" : "keep")
      .assemble(lora_gemm_source, launch);
  set_grid(launch, LANES * GEMM_SIMDGROUPS, ceil_div(columns, GEMM_COLUMNS), ceil_div(p.in.rows, c.rows), c.splits);
  const uint64_t r = is_forward ? p.factor.cols : p.factor.rows;
  const uint32_t flags = (p.has_bias ? GEMM_HAS_BIAS : 0) | (aligned(p.in, p.dtype) ? GEMM_WIDE_X : 0) |
      (p.weight.bits == 0 && aligned(W, p.dtype) ? GEMM_WIDE_W : 0) |
      (r % wide_elements(p.adapter_dtype) == 0 ? GEMM_WIDE_H : 0) |
      (aligned(p.factor, p.adapter_dtype) ? GEMM_WIDE_FACTOR : 0) |
      (columns % wide_elements(written) == 0 ? GEMM_WIDE_Y : 0);
  set_arguments(
      launch,
      {{GEMM_ROWS_TERMS, pair(p.in.rows, terms)},
       {GEMM_COLUMNS_RANKS, pair(columns, r)},
       {GEMM_X_LEVELS, levels(p.in)},
       {GEMM_X_STRIDES, strides(p.in)},
       {GEMM_W_LAYOUT, layout(p.weight)},
       {GEMM_FACTOR_STRIDES, strides(p.factor)},
       {GEMM_FLAGS_BIAS_STRIDE, pair(flags, p.bias_stride)},
       {GEMM_DROPOUT_WORDS, dropout_words(p.dropout_p)},
       {GEMM_SPLIT_TERMS, pair(c.terms, 0)}});
  plan.sums = plan_sums(p.dtype, p.in.rows * columns, 0, c.splits);
  return plan;
}

}  // namespace torch_fused_lora
