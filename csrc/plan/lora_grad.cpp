#include "../../metal/lora_grad.h"

#include <algorithm>

#include "dropout.h"
#include "lora.h"
#include "planning.h"

extern const char lora_grad_source[];  // metal/embed.py writes it

namespace torch_fused_lora {

using namespace tfl;  // what metal/ says

namespace {

constexpr uint64_t kLeastSplitRows = 64;  // of the rows that are split

/// A configuration but for the splits, which all launches of a problem share: the tiles of so many ranks, MAX_RANKS a
/// threadgroup.
GradConfiguration tiles_of(uint64_t ranks) {
  const auto blocks = static_cast<short>(ceil_div(std::min<uint64_t>(ranks, MAX_RANKS), BLOCK));
  const auto u = [](short value) { return static_cast<uint32_t>(value); };
  return {u(blocks), u(grad_columns(blocks)), u(grad_depth(blocks)), 1, 0};
}

/// Column tiles of dA and of dB.
struct Tiles {
  uint64_t A, B;

  Tiles(const GradProblem& p, const GradConfiguration& c)
      : A(p.need_A ? ceil_div(p.x.cols, c.columns) : 0), B(p.need_B ? ceil_div(p.dy.cols, c.columns) : 0) {}
};

/// Threadgroups that a core has room for: what the sums take of its registers grows with the rank.
uint64_t groups_a_core(const GradConfiguration& c) { return c.rank_blocks <= 4 ? 4 : 2; }

/// Rows are split as long as all threadgroups run at once and a split has kLeastSplitRows, and two rows a rank: its
/// partial sums, written and read once more, grow with the ranks.
GradConfiguration choose(const GradProblem& p) {
  GradConfiguration c = tiles_of(p.r);
  const uint64_t M = p.dy.rows;
  const Tiles tiles(p, c);
  uint64_t splits = std::min(
      groups_a_core(c) * p.gpu_cores / std::max<uint64_t>(tiles.A + tiles.B, 1),
      M / std::max(kLeastSplitRows, 2 * p.r));
  splits = std::max<uint64_t>(splits, 1);
  splits = std::min<uint64_t>(unless(overrides().lora_grad.splits, splits), UINT32_MAX);
  const uint64_t rows = std::max<uint64_t>(ceil_div(ceil_div(M, splits), GRAD_DEPTH) * GRAD_DEPTH, GRAD_DEPTH);
  c.split_rows = static_cast<uint32_t>(rows);
  c.splits = static_cast<uint32_t>(std::max<uint64_t>(ceil_div(M, rows), 1));
  return c;
}

void assemble(const GradProblem& p, const Slice& slice, const GradConfiguration& c, Launch& launch) {
  const Tiles tiles(p, c);
  const uint32_t wide_small = wide_elements(p.adapter_dtype);
  const uint32_t flags = (aligned(p.x, p.dtype) ? GRAD_WIDE_X : 0) | (aligned(p.dy, p.dtype) ? GRAD_WIDE_DY : 0) |
      (p.r % wide_small == 0 && slice.begin % wide_small == 0 ? GRAD_WIDE_SMALL : 0);
  const Operand small = {p.dy.rows, slice.end - slice.begin, p.dy.rows, 0, p.r, 1, slice.begin};
  const bool by_rows = (!p.need_A || layout_of(p.x, p.dtype) == Layout::rows) &&
      (!p.need_B || layout_of(p.dy, p.dtype) == Layout::rows) && layout_of(small, p.adapter_dtype) == Layout::rows;
  Variant variant("lora_grad");
  variant.add(msl(p.dtype))
      .add(msl(p.adapter_dtype))
      .add(c.splits > 1 ? "float" : msl(p.adapter_dtype))
      .add(c.rank_blocks)
      .add(slice.p > 0 ? "true" : "false", slice.p > 0 ? "drop" : "plain");
  add_layout(variant, by_rows ? Layout::rows : Layout::any);
  variant.assemble(lora_grad_source, launch);
  set_grid(launch, LANES * GRAD_SIMDGROUPS, tiles.A + tiles.B, c.splits, ceil_div(slice.end - slice.begin, MAX_RANKS));
  set_arguments(
      launch,
      {{GRAD_ROWS, pair(p.dy.rows, c.split_rows)},
       {GRAD_K_N, pair(p.x.cols, p.dy.cols)},
       {GRAD_RANKS, pair(slice.begin, slice.end)},
       {GRAD_X_LEVELS, levels(p.x)},
       {GRAD_X_STRIDES, strides(p.x)},
       {GRAD_DY_LEVELS, levels(p.dy)},
       {GRAD_DY_STRIDES, strides(p.dy)},
       {GRAD_FLAGS_STREAM, pair(flags, slice.stream)},
       {GRAD_DROPOUT_WORDS, dropout_words(slice.p)},
       {GRAD_R_TILES, pair(p.r, tiles.A)}});
}

}  // namespace

Plan<GradConfiguration> plan(const GradProblem& p) {
  Plan<GradConfiguration> plan = {too_large({{"x", p.x}, {"dy", p.dy}})};
  const Tiles tiles(p, tiles_of(p.r));
  if (!plan.error.empty() || tiles.A + tiles.B == 0) return plan;
  const GradConfiguration shared = choose(p);
  // Without dropout one launch covers all ranks; with it, one launch an adapter.
  for_each_slice(p.dropout, p.r, UINT32_MAX, [&](const Slice& slice) {
    auto& [launch, c] = plan.steps.emplace_back();
    c = tiles_of(slice.end - slice.begin);
    c.splits = shared.splits;
    c.split_rows = shared.split_rows;
    assemble(p, slice, c, launch);
  });
  plan.sums = plan_sums(p.adapter_dtype, p.need_A ? p.r * p.x.cols : 0, p.need_B ? p.r * p.dy.cols : 0, shared.splits);
  return plan;
}

}  // namespace torch_fused_lora
