#include "lora_plan.h"

#include <algorithm>
#include <cstring>

#include "../metal/lora_decode.h"
#include "../metal/lora_delta.h"
#include "../metal/lora_grad.h"
#include "planning.h"

// metal/, each family with its headers inlined: csrc/embed_metal.py writes them when the extension is built.
extern const char lora_decode_source[], lora_delta_source[], lora_grad_source[];

namespace torch_fused_lora {

using namespace tfl;  // what metal/ says

namespace {

// ------------------------------------------------------------------------------------------------ what is planned with

constexpr uint32_t kManyRows = 1024;  // from here on lora_delta reads x once; fewer rows may split the columns
constexpr double kRereads = 0.05;     // of W's bytes, that more than one threadgroup a core may cost

const char* check(const Problem& p) {
  for (const char* error : {
           check(p.x, "x: a dimension or stride of 2**32 elements or more"),
           check(p.weight, "weight: a dimension or stride of 2**32 elements or more"),
           check(p.lora_A, "lora_A: a dimension or stride of 2**32 elements or more"),
           check(p.lora_B, "lora_B: a dimension or stride of 2**32 elements or more"),
           check(p.dy, "dy: a dimension or stride of 2**32 elements or more")}) {
    if (error != nullptr) return error;
  }
  return nullptr;
}

/// A slice of the stacked ranks that one launch covers: at most MAX_RANKS of one adapter, or of all where none drops.
struct Slice {
  uint32_t begin, end, stream;
  double p;
};

/// Slice `index` in `*slice`; returns how many there are.
uint32_t rank_slices(const Problem& problem, uint32_t max_ranks, uint32_t index, Slice* slice) {
  const uint32_t r = static_cast<uint32_t>(problem.lora_A.rows);
  const bool drops = problem.dropout_p != nullptr;
  uint32_t count = 0, adapter_begin = 0;
  for (uint32_t adapter = 0; adapter < (drops ? problem.adapters : 1); ++adapter) {
    const uint32_t adapter_end = drops ? adapter_begin + problem.ranks[adapter] : r;
    for (uint32_t begin = adapter_begin; begin < adapter_end; begin += std::min(max_ranks, adapter_end - begin)) {
      if (count++ == index) {
        const double p = drops ? problem.dropout_p[adapter] : 0.0;
        *slice = {begin, begin + std::min(max_ranks, adapter_end - begin), adapter, p};
      }
    }
    adapter_begin = adapter_end;
  }
  return count;
}

/// The threshold below which a random word drops, and the bits of 1 / (1 - p).
uint64_t dropout_words(double p) {
  const double scaled = p * 4294967296.0;
  const double rounded = static_cast<double>(static_cast<uint64_t>(scaled));
  uint64_t threshold = static_cast<uint64_t>(scaled);
  const double rest = scaled - rounded;  // round half to even, as Python's round does
  if (rest > 0.5 || (rest == 0.5 && threshold % 2 == 1)) ++threshold;
  const float inverse_keep = static_cast<float>(1.0 / (1.0 - p));
  uint32_t bits;
  std::memcpy(&bits, &inverse_keep, sizeof bits);
  return pack(std::min<uint64_t>(threshold, UINT32_MAX), bits);
}

// --------------------------------------------------------------------------------------------------------- lora_delta

/// What lora_delta computes, in its own terms: out += s (in down^T) up^T.
struct Delta {
  Operand in, down, up;  // M x K, r x K, N x r
  uint64_t out_offset;
  Mask mask;
};

const char* plan_delta(const Problem& problem, const Delta& delta, uint32_t index, Launch* launch, uint32_t* count) {
  if (const char* error = check(problem)) return error;
  const uint64_t M = delta.in.rows, K = delta.in.cols, N = delta.up.rows, r = problem.lora_A.rows;
  Slice slice;
  *count = rank_slices(problem, MAX_RANKS, index, &slice);
  if (index >= *count) return nullptr;

  const uint32_t rank_blocks = static_cast<uint32_t>(ceil_div(slice.end - slice.begin, BLOCK));
  const uint32_t width = static_cast<uint32_t>(delta_width(static_cast<short>(rank_blocks)));
  // Few rows: no more row blocks than they fill, and the simdgroups that are left over share K.
  const uint32_t row_blocks = M <= BLOCK ? 1 : M <= 2 * BLOCK ? 2 : 4;
  const uint32_t k_slices = std::min(DELTA_SIMDGROUPS / row_blocks, width / BLOCK);
  const uint64_t row_tiles = ceil_div(M, BLOCK * row_blocks), column_tiles = ceil_div(N, width);

  // Columns are split until there is a group a core, as long as the loads (x and A again for every split) stay under
  // twice the least possible. With many rows the rows alone fill the GPU.
  uint64_t splits = 1;
  if (M < kManyRows && column_tiles > 0) {
    const double size = bytes(problem.dtype), adapter_size = bytes(problem.adapter_dtype);
    const double ranks = slice.end - slice.begin;
    const double x = M * K * size, y = M * N * size, A = ranks * K * adapter_size, B = ranks * N * adapter_size;
    const double least = x + y + A + B;
    const uint64_t wanted = std::min<uint64_t>(ceil_div(problem.gpu_cores, row_tiles), column_tiles);
    while (splits < wanted && (splits + 1) * (x + row_tiles * A) + y + row_tiles * B < 2 * least) ++splits;
  }
  const uint64_t columns = std::max<uint64_t>(ceil_div(column_tiles, splits), 1) * width;

  uint32_t flags = problem.save_h ? DELTA_SAVE_H : 0;
  Operand down = delta.down, up = delta.up;
  down.offset += slice.begin * down.row_stride;
  up.offset += slice.begin * up.col_stride;
  if (aligned(delta.in, problem.dtype)) flags |= DELTA_WIDE_X;
  if (aligned(down, problem.adapter_dtype)) flags |= DELTA_WIDE_A;
  if (aligned(up, problem.adapter_dtype)) flags |= DELTA_WIDE_B;
  const uint64_t wide_y = wide_elements(problem.dtype);
  if (delta.out_offset % wide_y == 0 && N % wide_y == 0) flags |= DELTA_WIDE_Y;

  const Mask mask = slice.p > 0 ? delta.mask : Mask::none;
  Variant("lora_delta")
      .add(msl(problem.dtype))
      .add(msl(problem.adapter_dtype))
      .add(rank_blocks)
      .add(row_blocks)
      .add(k_slices)
      .add(
          mask == Mask::none ? "tfl::Mask::none" : mask == Mask::input ? "tfl::Mask::input" : "tfl::Mask::output",
          mask == Mask::none ? "plain" : mask == Mask::input ? "drop_input" : "drop_output")
      .assemble(lora_delta_source, *launch);
  set_grid(*launch, 32 * row_blocks * k_slices, std::max<uint64_t>(ceil_div(N, columns), 1), row_tiles);
  set_arguments(
      *launch,
      {{DELTA_M_K, pack(M, K)},
       {DELTA_N_COLUMNS, pack(N, columns)},
       {DELTA_RANKS, pack(slice.begin, slice.end)},
       {DELTA_X_LEVELS, levels(delta.in)},
       {DELTA_X_STRIDES, strides(delta.in)},
       {DELTA_A_STRIDES, strides(delta.down)},
       {DELTA_B_STRIDES, strides(delta.up)},
       {DELTA_Y_STRIDE_FLAGS, pack(N, flags)},
       {DELTA_DROPOUT_WORDS, dropout_words(slice.p)},
       {DELTA_STREAM_H_STRIDE, pack(slice.stream, r)}});
  return nullptr;
}

}  // namespace

const char* tfl_plan_delta(const Problem* problem, uint32_t index, Launch* launch, uint32_t* count) {
  const Delta delta = {problem->x, problem->lora_A, problem->lora_B, problem->y_offset, Mask::input};
  return plan_delta(*problem, delta, index, launch, count);
}

const char* tfl_plan_delta_dx(
    const Problem* problem, uint32_t only_z, uint32_t index, Launch* launch, uint32_t* count) {
  Delta delta = {
      problem->dy, transposed(problem->lora_B), transposed(problem->lora_A), problem->y_offset, Mask::output};
  if (only_z) delta.up.rows = 0;
  return plan_delta(*problem, delta, index, launch, count);
}

// -------------------------------------------------------------------------------------------------------- lora_decode

uint32_t tfl_decodes(const Problem* problem) {
  // Dropout stays with lora_delta. A weight with unit stride along N (a transposed Conv1D) would be read a line a
  // element here, and is left to torch's matmul. The rank: h of all rows has to fit threadgroup memory.
  const bool rows_contiguous = problem->weight.col_stride == 1 || problem->weight.cols <= 1;
  return problem->x.rows <= DECODE_MAX_ROWS && problem->dropout_p == nullptr && rows_contiguous &&
      problem->lora_A.rows <= MAX_RANKS;
}

const char* tfl_plan_decode(const Problem* problem, uint32_t index, Launch* launch, uint32_t* count) {
  if (const char* error = check(*problem)) return error;
  *count = 1;
  if (index > 0) return nullptr;
  const uint64_t M = problem->x.rows, K = problem->x.cols, N = problem->weight.rows, r = problem->lora_A.rows;

  // Every threadgroup reads x and A again, as much as `again` rows of W. So there is one a core, and up to four, which
  // even out the finish, as long as the reading costs a few percent of W. A row a simdgroup is the least.
  const double again = M + static_cast<double>(r) * bytes(problem->adapter_dtype) / bytes(problem->dtype);
  const double groups_a_core = std::clamp(kRereads * N / (problem->gpu_cores * again), 1.0, 4.0);
  const uint64_t groups = problem->gpu_cores * static_cast<uint64_t>(groups_a_core);
  uint64_t rows = std::max<uint64_t>(ceil_div(N, groups), DECODE_SIMDGROUPS);
  // Rows of W that a simdgroup reads at once: the more, the better x is reused from registers.
  const uint32_t w_rows = rows >= 4 * DECODE_SIMDGROUPS ? 4 : rows >= 2 * DECODE_SIMDGROUPS ? 2 : 1;
  rows = ceil_div(rows, w_rows) * w_rows;

  const auto vector = [K](const Operand& m, Scalar dtype) {
    const uint32_t wide = wide_elements(dtype);
    return m.col_stride == 1 && aligned(m, dtype) && K % wide == 0 ? wide : 1;
  };
  Variant("lora_decode")
      .add(msl(problem->dtype))
      .add(msl(problem->adapter_dtype))
      .add(static_cast<uint32_t>(M))
      .add(w_rows)
      .add(vector(problem->weight, problem->dtype))
      .add(vector(problem->lora_A, problem->adapter_dtype))
      .assemble(lora_decode_source, *launch);
  set_grid(*launch, 32 * DECODE_SIMDGROUPS, ceil_div(N, rows));
  const uint32_t flags = (problem->has_bias ? DECODE_HAS_BIAS : 0) | (problem->save_h ? DECODE_SAVE_H : 0);
  set_arguments(
      *launch,
      {{DECODE_K_N, pack(K, N)},
       {DECODE_RANK_ROWS, pack(r, rows)},
       {DECODE_X_LEVELS, levels(problem->x)},
       {DECODE_X_STRIDES, strides(problem->x)},
       {DECODE_W_STRIDES, strides(problem->weight)},
       {DECODE_A_STRIDES, strides(problem->lora_A)},
       {DECODE_B_STRIDES, strides(problem->lora_B)},
       {DECODE_FLAGS_BIAS_STRIDE, pack(flags, problem->bias_stride)}});
  return nullptr;
}

// ---------------------------------------------------------------------------------------------------------- lora_grad

const char* tfl_plan_grad(
    const Problem* problem, uint32_t need_A, uint32_t need_B, uint32_t index, Launch* launch, uint32_t* count,
    uint32_t* splits_out) {
  if (const char* error = check(*problem)) return error;
  const uint64_t M = problem->x.rows, K = problem->x.cols, N = problem->weight.rows, r = problem->lora_A.rows;
  // Without dropout one launch covers all ranks, MAX_RANKS a group; with it, one launch an adapter.
  Slice slice;
  const uint32_t launches = rank_slices(*problem, UINT32_MAX, index, &slice);

  const auto blocks = [](uint64_t ranks) {  // of a threadgroup
    return static_cast<short>(ceil_div(std::min<uint64_t>(ranks, MAX_RANKS), BLOCK));
  };
  const auto columns = [&](uint64_t ranks) { return static_cast<uint64_t>(grad_columns(blocks(ranks))); };
  // Rows are split until there are two groups a core, as long as a split has 128 rows and the partial sums, written and
  // read once more, stay under a quarter of the bytes of x and dy.
  const uint64_t tiles = (need_A ? ceil_div(K, columns(r)) : 0) + (need_B ? ceil_div(N, columns(r)) : 0);
  uint64_t splits = std::min(ceil_div(2 * problem->gpu_cores, std::max<uint64_t>(tiles, 1)), M / 128);
  splits = std::max<uint64_t>(std::min(splits, M * bytes(problem->dtype) / (32 * r)), 1);
  const uint64_t split_rows = std::max<uint64_t>(ceil_div(ceil_div(M, splits), GRAD_DEPTH) * GRAD_DEPTH, GRAD_DEPTH);
  splits = std::max<uint64_t>(ceil_div(M, split_rows), 1);
  *splits_out = static_cast<uint32_t>(splits);
  *count = launches + (splits > 1 ? 1 : 0);

  if (index < launches) {
    const uint32_t slice_ranks = slice.end - slice.begin;
    const uint64_t A_tiles = need_A ? ceil_div(K, columns(slice_ranks)) : 0;
    const uint64_t B_tiles = need_B ? ceil_div(N, columns(slice_ranks)) : 0;
    const uint32_t wide_small = wide_elements(problem->adapter_dtype);
    const uint32_t flags = (aligned(problem->x, problem->dtype) ? GRAD_WIDE_X : 0) |
        (aligned(problem->dy, problem->dtype) ? GRAD_WIDE_DY : 0) |
        (r % wide_small == 0 && slice.begin % wide_small == 0 ? GRAD_WIDE_SMALL : 0);
    Variant("lora_grad")
        .add(msl(problem->dtype))
        .add(msl(problem->adapter_dtype))
        .add(splits > 1 ? "float" : msl(problem->adapter_dtype))
        .add(static_cast<uint32_t>(blocks(slice_ranks)))
        .add(slice.p > 0 ? "true" : "false", slice.p > 0 ? "drop" : "plain")
        .assemble(lora_grad_source, *launch);
    set_grid(*launch, 32 * GRAD_SIMDGROUPS, A_tiles + B_tiles, splits, ceil_div(slice_ranks, MAX_RANKS));
    set_arguments(
        *launch,
        {{GRAD_ROWS, pack(M, split_rows)},
         {GRAD_K_N, pack(K, N)},
         {GRAD_RANKS, pack(slice.begin, slice.end)},
         {GRAD_X_LEVELS, levels(problem->x)},
         {GRAD_X_STRIDES, strides(problem->x)},
         {GRAD_DY_LEVELS, levels(problem->dy)},
         {GRAD_DY_STRIDES, strides(problem->dy)},
         {GRAD_FLAGS_STREAM, pack(flags, slice.stream)},
         {GRAD_DROPOUT_WORDS, dropout_words(slice.p)},
         {GRAD_R_TILES, pack(r, A_tiles)}});
  } else if (index < *count) {
    plan_sum(problem->adapter_dtype, need_A ? r * K : 0, need_B ? r * N : 0, splits, launch);
  }
  return nullptr;
}

}  // namespace torch_fused_lora
