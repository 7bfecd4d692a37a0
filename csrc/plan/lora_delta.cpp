#include "../../metal/lora_delta.h"

#include <algorithm>

#include "dropout.h"
#include "lora.h"
#include "planning.h"

extern const char lora_delta_source[];  // metal/embed.py writes it

namespace torch_fused_lora {

using namespace tfl;  // what metal/ says

namespace {

constexpr uint64_t kGroupsACore = 2;  // that hide each other's waiting
constexpr uint64_t kMostSplits = 16;  // of K: every threadgroup of the second dispatch adds them up
constexpr uint64_t kShort = 4;        // tiles of K that are read again sooner than a second dispatch is made

/// out += s (in down^T) up^T for a slice of the ranks. `down` is r x K, `up` N x r.
struct Delta {
  const DeltaProblem& problem;
  Operand down, up;
  Slice slice;
};

DeltaConfiguration choose(const Delta& delta) {
  const DeltaConfiguration& forced = overrides().lora_delta;
  const DeltaProblem& p = delta.problem;
  DeltaConfiguration c;
  const uint64_t M = p.in.rows, K = p.in.cols, N = delta.up.rows, ranks = delta.slice.end - delta.slice.begin;
  c.rank_blocks = static_cast<uint32_t>(ceil_div(ranks, BLOCK));
  c.width = static_cast<uint32_t>(delta_width(static_cast<short>(c.rank_blocks)));

  // Few rows: no more row blocks than they fill, and the simdgroups that are left over share the columns of a tile. The
  // kernel wants a block of a tile for each of them, and no more runs of a tile than threads. The narrow tiles of many
  // ranks would leave it too few threads for their registers to hold a tile on its way.
  const bool few = M <= 2 * BLOCK && c.rank_blocks <= 8;
  c.row_blocks = unless(forced.row_blocks, !few ? 4 : M <= BLOCK ? 1 : 2);
  const auto short_ = [](uint32_t value) { return static_cast<short>(value); };
  const uint32_t row_groups = c.row_blocks / delta_blocks(short_(c.rank_blocks), short_(c.row_blocks));
  const uint32_t most = std::min<uint32_t>(DELTA_SIMDGROUPS, row_groups * c.width / BLOCK);
  const uint64_t least = ceil_div(c.row_blocks * c.width, LANES);
  const uint64_t simdgroups = within(unless(forced.simdgroups, most), least, most);
  c.simdgroups = static_cast<uint32_t>(ceil_div(simdgroups, row_groups) * row_groups);

  // Where the rows alone do not fill the GPU, K is split in a dispatch of its own, and N in the next. A short K is not
  // worth a dispatch: the threadgroups that share the columns of y read x and A again.
  const uint64_t row_tiles = ceil_div(M, BLOCK * c.row_blocks);
  const uint64_t k_tiles = ceil_div(K, c.width), column_tiles = ceil_div(N, c.width);
  const uint64_t splits = std::max<uint64_t>(kGroupsACore * p.gpu_cores / std::max<uint64_t>(row_tiles, 1), 1);
  const bool two = forced.k_splits > 0 ? forced.k_splits > 1 : k_tiles > kShort && splits > 1;
  const auto even = [](uint64_t tiles, uint64_t splits) { return std::max<uint64_t>(ceil_div(tiles, splits), 1); };
  const uint64_t k_splits = two ? within(unless(forced.k_splits, std::min(splits, kMostSplits)), 1, k_tiles) : 1;
  c.k_columns = static_cast<uint32_t>(even(k_tiles, k_splits) * c.width);
  c.k_splits = static_cast<uint32_t>(std::max<uint64_t>(ceil_div(K, c.k_columns), 1));
  const uint64_t column_splits = within(unless(forced.splits, splits), 1, column_tiles);
  c.columns = static_cast<uint32_t>(even(column_tiles, column_splits) * c.width);
  c.splits = static_cast<uint32_t>(std::max<uint64_t>(ceil_div(N, c.columns), 1));
  return c;
}

/// The dispatch that does these stages.
void assemble(const Delta& delta, const DeltaConfiguration& c, uint32_t stages, Launch& launch) {
  const DeltaProblem& p = delta.problem;
  const Slice& slice = delta.slice;
  const uint64_t M = p.in.rows, N = delta.up.rows;

  uint32_t flags = stages | (p.has_low_rank ? DELTA_SAVE_H : 0);
  Operand down = delta.down, up = delta.up;
  down.offset += slice.begin * down.row_stride;
  up.offset += slice.begin * up.col_stride;
  if (aligned(p.in, p.dtype)) flags |= DELTA_WIDE_X;
  if (aligned(down, p.adapter_dtype)) flags |= DELTA_WIDE_A;
  if (aligned(up, p.adapter_dtype)) flags |= DELTA_WIDE_B;
  const uint64_t wide_y = wide_elements(p.dtype);
  if (p.out_offset % wide_y == 0 && N % wide_y == 0) flags |= DELTA_WIDE_Y;

  Variant variant("lora_delta");
  variant.add(msl(p.dtype)).add(msl(p.adapter_dtype)).add(c.rank_blocks).add(c.row_blocks).add(c.simdgroups);
  if (slice.p == 0) {
    variant.add("tfl::Mask::none", "plain");
  } else if (p.pass == Pass::forward) {
    variant.add("tfl::Mask::input", "drop_input");
  } else {
    variant.add("tfl::Mask::output", "drop_output");
  }
  variant.assemble(lora_delta_source, launch);
  const uint32_t splits = (stages & DELTA_UP) != 0 ? c.splits : c.k_splits;
  set_grid(launch, LANES * c.simdgroups, splits, ceil_div(M, BLOCK * c.row_blocks));
  set_arguments(
      launch,
      {{DELTA_M_K, pair(M, p.in.cols)},
       {DELTA_N_COLUMNS, pair(N, c.columns)},
       {DELTA_RANKS, pair(slice.begin, slice.end)},
       {DELTA_X_LEVELS, levels(p.in)},
       {DELTA_X_STRIDES, strides(p.in)},
       {DELTA_A_STRIDES, strides(down)},
       {DELTA_B_STRIDES, strides(up)},
       {DELTA_Y_STRIDE_FLAGS, pair(N, flags)},
       {DELTA_DROPOUT_WORDS, dropout_words(slice.p)},
       {DELTA_STREAM_H_STRIDE, pair(slice.stream, delta.down.rows)},
       {DELTA_K_SPLITS, pair(c.k_columns, c.k_splits)}});
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
    const auto add = [&](uint32_t stages) {
      plan.steps.push_back({{}, c});
      assemble(delta, c, stages, plan.steps.back().launch);
    };
    if (c.k_splits == 1) return add(DELTA_DOWN | DELTA_UP);
    add(DELTA_DOWN);
    add(DELTA_UP);
    const uint64_t padded = ceil_div(p.in.rows, BLOCK * c.row_blocks) * BLOCK * c.row_blocks * BLOCK * c.rank_blocks;
    plan.sums.splits = std::max(plan.sums.splits, c.k_splits);
    plan.sums.elements = std::max(plan.sums.elements, padded);
  });
  return plan;
}

}  // namespace torch_fused_lora
