#include "../../metal/lora_delta.h"

#include <algorithm>

#include "dropout.h"
#include "lora.h"
#include "planning.h"

extern const char lora_delta_source[];  // metal/embed.py writes it

namespace torch_fused_lora {

using namespace tfl;  // what metal/ says

namespace {

constexpr uint64_t kMostSplits = 16;  // of K: every threadgroup of the second dispatch adds them up
constexpr uint64_t kMostSplitsOfMany = 32;  // the same above rank 32, where a step along K takes longer

/// out += s (in down^T) up^T for a slice of the ranks. `down` is r x K, `up` N x r.
struct Delta {
  const DeltaProblem& problem;
  Operand down, up;
  Slice slice;
};

/// Threadgroups that a core has room for, so that they hide each other's waiting: the registers grow with the rank.
uint64_t groups_a_core(const DeltaConfiguration& c) { return c.rank_blocks <= 4 ? 4 : 2; }

/// An even share of so many tiles.
uint64_t share(uint64_t tiles, uint64_t splits) { return std::max<uint64_t>(ceil_div(tiles, splits), 1); }

DeltaConfiguration choose(const Delta& delta) {
  const DeltaConfiguration& forced = overrides().lora_delta;
  const DeltaProblem& p = delta.problem;
  DeltaConfiguration c;
  const uint64_t M = p.in.rows, K = p.in.cols, N = delta.up.rows, ranks = delta.slice.end - delta.slice.begin;
  const uint64_t rank_blocks = ceil_div(ranks, BLOCK);
  // A few sizes of tiles for all ranks.
  c.rank_blocks =
      static_cast<uint32_t>(rank_blocks > DELTA_CHUNK ? ceil_div(rank_blocks, DELTA_CHUNK) * DELTA_CHUNK : rank_blocks);
  // Tiles of 32 rows are too few for the cores, however K is split.
  const bool is_few = M <= 2 * BLOCK || ceil_div(M, 4 * BLOCK) * kMostSplits < p.gpu_cores;
  // So few rows as 8 are decoded, not trained with dropout: no kernels for that.
  c.row_blocks = unless(forced.row_blocks, M <= BLOCK && delta.slice.p == 0 ? 1 : is_few ? 2 : 4);

  // As many threadgroups as the GPU has room for at once, in either stage: what the rows leave free, K and N fill.
  const auto short_ = [](uint32_t value) { return static_cast<short>(value); };
  const uint64_t groups = groups_a_core(c) * p.gpu_cores;
  const auto splits = [&](uint32_t forced, uint64_t row_blocks, uint64_t tiles, uint64_t most) {
    const uint64_t row_tiles = ceil_div(M, BLOCK * row_blocks);
    return within(unless(forced, std::min(groups / row_tiles, most)), 1, std::max<uint64_t>(tiles, 1));
  };
  const uint64_t width = delta_width(short_(c.rank_blocks)), k_tiles = ceil_div(K, width);
  const uint64_t most = c.rank_blocks <= 4 ? kMostSplits : kMostSplitsOfMany;
  c.width = static_cast<uint32_t>(width);
  c.k_columns = static_cast<uint32_t>(share(k_tiles, splits(forced.k_splits, c.row_blocks, k_tiles, most)) * width);
  c.k_splits = static_cast<uint32_t>(std::max<uint64_t>(ceil_div(K, c.k_columns), 1));
  c.up_row_blocks = static_cast<uint32_t>(delta_up_rows(short_(c.row_blocks), short_(c.rank_blocks)));
  const uint64_t columns = delta_columns(short_(c.row_blocks), short_(c.rank_blocks)), tiles = ceil_div(N, columns);
  c.columns = static_cast<uint32_t>(share(tiles, splits(forced.splits, c.up_row_blocks, tiles, tiles)) * columns);
  c.splits = static_cast<uint32_t>(std::max<uint64_t>(ceil_div(N, c.columns), 1));
  return c;
}

void assemble(const Delta& delta, const DeltaConfiguration& c, Stage stage, Launch& launch) {
  const DeltaProblem& p = delta.problem;
  const Slice& slice = delta.slice;
  const uint64_t M = p.in.rows, N = delta.up.rows;

  uint32_t flags = p.has_low_rank ? DELTA_SAVE_H : 0;
  Operand down = delta.down, up = delta.up;
  down.offset += slice.begin * down.row_stride;
  up.offset += slice.begin * up.col_stride;
  down.rows = up.cols = slice.end - slice.begin;
  if (aligned(p.in, p.dtype)) flags |= DELTA_WIDE_X;
  if (aligned(down, p.adapter_dtype)) flags |= DELTA_WIDE_A;
  if (aligned(up, p.adapter_dtype)) flags |= DELTA_WIDE_B;
  const uint64_t wide_y = wide_elements(p.dtype);
  if (p.out_offset % wide_y == 0 && N % wide_y == 0) flags |= DELTA_WIDE_Y;

  const bool is_down = stage == Stage::down, is_forward = p.pass == Pass::forward;
  const bool drops = slice.p > 0 && is_down == is_forward;  // the input forward, the result backward
  const Operand y = {M, N, M, 0, N, 1, p.out_offset};
  const bool by_rows = layout_of(is_down ? p.in : y, p.dtype) == Layout::rows;
  Variant variant("lora_delta");
  variant.add(msl(p.dtype))
      .add(msl(p.adapter_dtype))
      .add(is_down ? "tfl::Stage::down" : "tfl::Stage::up", is_down ? "down" : "up")
      .add(c.rank_blocks)
      .add(c.row_blocks)
      .add(drops ? "true" : "false", drops ? "drop" : "plain");
  add_layout(variant, by_rows ? layout_of(is_down ? down : up, p.adapter_dtype) : Layout::any);
  variant.assemble(lora_delta_source, launch);
  const uint64_t row_tiles = ceil_div(M, BLOCK * (is_down ? c.row_blocks : c.up_row_blocks));
  set_grid(launch, LANES * DELTA_SIMDGROUPS, is_down ? c.k_splits : c.splits, row_tiles);
  set_arguments(
      launch,
      {{DELTA_M_K, pair(M, p.in.cols)},
       {DELTA_N_COLUMNS, pair(N, c.columns)},
       {DELTA_RANKS, pair(slice.begin, slice.end)},
       {DELTA_X_LEVELS, levels(p.in)},
       {DELTA_X_STRIDES, strides(p.in)},
       {DELTA_A_STRIDES, strides(down)},
       {DELTA_B_STRIDES, strides(up)},
       {DELTA_FLAGS_STREAM, pair(flags, slice.stream)},
       {DELTA_DROPOUT_WORDS, dropout_words(slice.p)},
       {DELTA_K_SPLITS, pair(c.k_columns, c.k_splits)},
       {DELTA_H_STRIDE, pair(delta.down.rows, 0)}});
}

}  // namespace

Plan<DeltaConfiguration> plan(const DeltaProblem& p) {
  const bool is_forward = p.pass == Pass::forward;
  Plan<DeltaConfiguration> plan = {
      too_large({{is_forward ? "x" : "dy", p.in}, {"lora_A", p.lora_A}, {"lora_B", p.lora_B}})};
  if (!plan.error.empty() || p.in.rows == 0) return plan;
  Delta delta = {p, is_forward ? p.lora_A : transposed(p.lora_B), is_forward ? p.lora_B : transposed(p.lora_A), {}};
  if (!p.has_out) delta.up.rows = 0;
  for_each_slice(p.dropout, p.lora_A.rows, MAX_RANKS, [&](const Slice& slice) {
    delta.slice = slice;
    const DeltaConfiguration c = choose(delta);
    for (Stage stage : {Stage::down, Stage::up}) {
      plan.steps.push_back({{}, c});
      assemble(delta, c, stage, plan.steps.back().launch);
    }
    plan.sums.splits = std::max(plan.sums.splits, c.k_splits);
    plan.sums.elements = std::max(plan.sums.elements, p.in.rows * c.rank_blocks * BLOCK);
  });
  return plan;
}

}  // namespace torch_fused_lora
