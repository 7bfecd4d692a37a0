#include "../../metal/lora_decode.h"

#include <algorithm>

#include "lora.h"
#include "planning.h"

extern const char lora_decode_source[];  // metal/embed.py writes it

namespace torch_fused_lora {

using namespace tfl;  // what metal/ says

namespace {

constexpr uint64_t kGroups = 256;             // at least, where W has the rows
constexpr uint64_t kBytesALaunch = 64 << 10;  // that a core reads from the cache while a dispatch starts

/// Rows of x that a kernel is compiled for: few kernels, and few sums for nothing.
uint32_t compiled_rows(uint64_t M) { return M <= 2 ? static_cast<uint32_t>(M) : M <= 4 ? 4 : DECODE_MAX_ROWS; }

uint64_t group_rows(uint32_t slices) { return DECODE_SIMDGROUPS / slices * DECODE_W_ROWS; }

DecodeConfiguration choose(const DecodeProblem& p) {
  const DecodeConfiguration& forced = overrides().lora_decode;
  DecodeConfiguration c = {};
  const uint64_t K = p.x.cols, N = p.weight.operand.rows, r = p.lora_A.rows;
  const auto groups = [&] { return ceil_div(N, group_rows(c.slices)); };
  const uint64_t runs = p.weight.bits > 0 ? decode_packed_runs(static_cast<short>(compiled_rows(p.x.rows))) : 1;
  // The more simdgroups share rows, the more loads are in flight for each, and the more sums there are to add up.
  const uint32_t least = p.x.rows == 1 ? 4 : 2;
  c.slices = 1;
  while (c.slices < DECODE_SIMDGROUPS && c.slices * LANES * RUN * runs < K &&
         (c.slices < least || groups() < kGroups)) {
    c.slices *= 2;
  }
  c.slices = unless(forced.slices, c.slices);

  // In one dispatch every threadgroup reads A again, as far as the sums of all ranks fit its memory.
  const bool fits = compiled_rows(p.x.rows) * ceil_div(r, DECODE_W_ROWS) * DECODE_W_ROWS <= DECODE_MOST_H;
  const uint64_t again = r * K * bytes(p.adapter_dtype) * ceil_div(groups(), p.gpu_cores);
  c.dispatches = fits ? unless(forced.dispatches, again <= kBytesALaunch ? 1 : 2) : 2;
  return c;
}

/// The dispatch that does these stages.
void assemble(const DecodeProblem& p, const DecodeConfiguration& c, uint32_t stages, Launch& launch) {
  const uint64_t K = p.x.cols, N = p.weight.operand.rows, r = p.lora_A.rows;
  const auto wide = [](const Operand& m, Scalar dtype) { return m.col_stride == 1 && aligned(m, dtype); };
  uint32_t flags = stages | (p.has_bias ? DECODE_HAS_BIAS : 0) | (p.save_h ? DECODE_SAVE_H : 0);
  if (wide(p.x, p.dtype) && wide(p.lora_A, p.adapter_dtype)) flags |= DECODE_WIDE_A;
  const bool packed = p.weight.bits > 0;  // words are read one by one
  if (wide(p.x, p.dtype) && (packed || wide(p.weight.operand, p.dtype))) flags |= DECODE_WIDE_W;
  Variant variant("lora_decode");
  variant.add(msl(p.dtype)).add(msl(p.adapter_dtype));
  add_format(variant, p.weight, p.dtype);
  variant.add(compiled_rows(p.x.rows)).assemble(lora_decode_source, launch);
  const bool up = (stages & DECODE_UP) != 0;
  set_grid(launch, LANES * DECODE_SIMDGROUPS, up ? ceil_div(N, group_rows(c.slices)) : ceil_div(r, DECODE_W_ROWS));
  set_arguments(
      launch,
      {{DECODE_K_N, pair(K, N)},
       {DECODE_RANK_ROWS, pair(r, p.x.rows)},
       {DECODE_X_LEVELS, levels(p.x)},
       {DECODE_X_STRIDES, strides(p.x)},
       {DECODE_W_LAYOUT, layout(p.weight)},
       {DECODE_A_STRIDES, strides(p.lora_A)},
       {DECODE_B_STRIDES, strides(p.lora_B)},
       {DECODE_FLAGS_BIAS_STRIDE, pair(flags, p.bias_stride)},
       {DECODE_SLICES, pair(c.slices, 0)}});
}

}  // namespace

bool decodes(uint64_t M, uint64_t r, bool weight_in_rows, bool drops) {
  // Dropout stays with lora_delta. A weight with unit stride along N (a transposed Conv1D) would be read a line an
  // element here, and is left to torch's matmul. The rank is as far as the tests go.
  return M <= DECODE_MAX_ROWS && r <= MAX_RANKS && weight_in_rows && !drops;
}

Plan<DecodeConfiguration> plan(const DecodeProblem& p) {
  Plan<DecodeConfiguration> plan = {too_large(
      {{"x", p.x},
       {"weight", p.weight.operand},
       {"lora_A", p.lora_A},
       {"lora_B", p.lora_B},
       {"bias", bias_of(p.bias_stride)}})};
  if (!plan.error.empty()) return plan;
  const DecodeConfiguration c = choose(p);
  const auto add = [&](uint32_t stages) {
    plan.steps.push_back({{}, c});
    assemble(p, c, stages, plan.steps.back().launch);
  };
  if (p.lora_A.rows == 0) {
    add(DECODE_UP);
  } else if (c.dispatches == 1) {
    add(DECODE_DOWN | DECODE_UP);
  } else {
    add(DECODE_DOWN);
    add(DECODE_UP);
    plan.sums.elements = p.lora_A.rows * compiled_rows(p.x.rows);
  }
  return plan;
}

}  // namespace torch_fused_lora
