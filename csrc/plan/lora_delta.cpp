#include "../../metal/lora_delta.h"

#include <algorithm>

#include "dropout.h"
#include "lora.h"
#include "planning.h"

extern const char lora_delta_source[];  // metal/embed.py writes it

namespace torch_fused_lora {

using namespace tfl;  // what metal/ says

namespace {

constexpr uint32_t kManyRows = 1024;  // from here on lora_delta reads x once; fewer rows may split the columns

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

  // Few rows: no more row blocks than they fill, and the simdgroups that are left over share K. The kernel wants a
  // block of a tile for each slice, and no more runs of a tile than threads.
  c.row_blocks = unless(forced.row_blocks, M <= BLOCK ? 1 : M <= 2 * BLOCK ? 2 : 4);
  const uint32_t most = std::min(DELTA_SIMDGROUPS / c.row_blocks, c.width / BLOCK);
  c.k_slices = static_cast<uint32_t>(within(unless(forced.k_slices, most), ceil_div(c.width, LANES), most));

  // Columns are split until there is a group a core, as long as the loads (x and A again for every split) stay under
  // twice the least possible. With many rows the rows alone fill the GPU.
  const uint64_t row_tiles = ceil_div(M, BLOCK * c.row_blocks), column_tiles = ceil_div(N, c.width);
  uint64_t splits = 1;
  if (M < kManyRows && column_tiles > 0) {
    const double size = bytes(p.dtype), adapter_size = bytes(p.adapter_dtype), r = ranks;
    const double x = M * K * size, y = M * N * size, A = r * K * adapter_size, B = r * N * adapter_size;
    const double least = x + y + A + B;
    const uint64_t wanted = std::min<uint64_t>(ceil_div(p.gpu_cores, row_tiles), column_tiles);
    while (splits < wanted && (splits + 1) * (x + row_tiles * A) + y + row_tiles * B < 2 * least) ++splits;
  }
  splits = within(unless(forced.splits, splits), 1, column_tiles);
  c.columns = static_cast<uint32_t>(std::max<uint64_t>(ceil_div(column_tiles, splits), 1) * c.width);
  c.splits = static_cast<uint32_t>(std::max<uint64_t>(ceil_div(N, c.columns), 1));
  return c;
}

void assemble(const Delta& delta, const DeltaConfiguration& c, Launch& launch) {
  const DeltaProblem& p = delta.problem;
  const Slice& slice = delta.slice;
  const uint64_t M = p.in.rows, N = delta.up.rows;

  uint32_t flags = p.has_low_rank ? DELTA_SAVE_H : 0;
  Operand down = delta.down, up = delta.up;
  down.offset += slice.begin * down.row_stride;
  up.offset += slice.begin * up.col_stride;
  if (aligned(p.in, p.dtype)) flags |= DELTA_WIDE_X;
  if (aligned(down, p.adapter_dtype)) flags |= DELTA_WIDE_A;
  if (aligned(up, p.adapter_dtype)) flags |= DELTA_WIDE_B;
  const uint64_t wide_y = wide_elements(p.dtype);
  if (p.out_offset % wide_y == 0 && N % wide_y == 0) flags |= DELTA_WIDE_Y;

  Variant variant("lora_delta");
  variant.add(msl(p.dtype)).add(msl(p.adapter_dtype)).add(c.rank_blocks).add(c.row_blocks).add(c.k_slices);
  if (slice.p == 0) {
    variant.add("tfl::Mask::none", "plain");
  } else if (p.pass == DeltaProblem::Pass::forward) {
    variant.add("tfl::Mask::input", "drop_input");
  } else {
    variant.add("tfl::Mask::output", "drop_output");
  }
  variant.assemble(lora_delta_source, launch);
  set_grid(launch, LANES * c.row_blocks * c.k_slices, c.splits, ceil_div(M, BLOCK * c.row_blocks));
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
       {DELTA_STREAM_H_STRIDE, pair(slice.stream, delta.down.rows)}});
}

}  // namespace

Plan<DeltaConfiguration> plan(const DeltaProblem& p) {
  const bool is_forward = p.pass == DeltaProblem::Pass::forward;
  Plan<DeltaConfiguration> plan = {
      too_large({{is_forward ? "x" : "dy", p.in}, {"lora_A", p.lora_A}, {"lora_B", p.lora_B}})};
  if (!plan.error.empty() || p.in.rows == 0) return plan;
  Delta delta = {p, is_forward ? p.lora_A : transposed(p.lora_B), is_forward ? p.lora_B : transposed(p.lora_A), {}};
  if (!p.has_out) delta.up.rows = 0;
  for_each_slice(p.dropout, p.lora_A.rows, MAX_RANKS, [&](const Slice& slice) {
    delta.slice = slice;
    auto& [launch, configuration] = plan.steps.emplace_back();
    configuration = choose(delta);
    assemble(delta, configuration, launch);
  });
  return plan;
}

}  // namespace torch_fused_lora
