#include "../../metal/lora_decode.h"

#include <algorithm>

#include "lora.h"
#include "planning.h"

extern const char lora_decode_source[];  // metal/embed.py writes it

namespace torch_fused_lora {

using namespace tfl;  // what metal/ says

namespace {

constexpr double kRereads = 0.05;  // of W's bytes, that more than one threadgroup a core may cost

DecodeConfiguration choose(const DecodeProblem& p) {
  const DecodeConfiguration& forced = overrides().lora_decode;
  DecodeConfiguration c;
  const uint64_t M = p.x.rows, K = p.x.cols, N = p.weight.rows, r = p.lora_A.rows;

  // Every threadgroup reads x and A again, as much as `again` rows of W. So there is one a core, and up to four, which
  // even out the finish, as long as the reading costs a few percent of W. A row a simdgroup is the least.
  const double again = M + static_cast<double>(r) * bytes(p.adapter_dtype) / bytes(p.dtype);
  const double groups_a_core = std::clamp(kRereads * N / (p.gpu_cores * again), 1.0, 4.0);
  const uint64_t groups = p.gpu_cores * static_cast<uint64_t>(groups_a_core);
  const uint64_t rows =
      forced.rows > 0 ? within(forced.rows, 1, N) : std::max<uint64_t>(ceil_div(N, groups), DECODE_SIMDGROUPS);
  // The more rows of W at once, the better x is reused from registers.
  c.w_rows = unless(forced.w_rows, rows >= 4 * DECODE_SIMDGROUPS ? 4 : rows >= 2 * DECODE_SIMDGROUPS ? 2 : 1);
  c.rows = static_cast<uint32_t>(ceil_div(rows, c.w_rows) * c.w_rows);

  const auto vector = [K](const Operand& m, Scalar dtype, uint32_t forced) {
    const uint32_t wide = wide_elements(dtype);
    const bool fits = m.col_stride == 1 && aligned(m, dtype) && K % wide == 0;
    return fits ? std::min(unless(forced, wide), wide) : 1;
  };
  c.w_vector = vector(p.weight, p.dtype, forced.w_vector);
  c.a_vector = vector(p.lora_A, p.adapter_dtype, forced.a_vector);
  return c;
}

}  // namespace

bool decodes(uint64_t M, uint64_t r, bool weight_in_rows, bool drops) {
  // Dropout stays with lora_delta. A weight with unit stride along N (a transposed Conv1D) would be read a line a
  // element here, and is left to torch's matmul. The rank: h of all rows has to fit threadgroup memory.
  return M <= DECODE_MAX_ROWS && r <= MAX_RANKS && weight_in_rows && !drops;
}

Plan<DecodeConfiguration> plan(const DecodeProblem& p) {
  Plan<DecodeConfiguration> plan = {
      too_large({{"x", p.x}, {"weight", p.weight}, {"lora_A", p.lora_A}, {"lora_B", p.lora_B}})};
  if (!plan.error.empty()) return plan;
  auto& [launch, c] = plan.steps.emplace_back();
  c = choose(p);
  Variant("lora_decode")
      .add(msl(p.dtype))
      .add(msl(p.adapter_dtype))
      .add(static_cast<uint32_t>(p.x.rows))
      .add(c.w_rows)
      .add(c.w_vector)
      .add(c.a_vector)
      .assemble(lora_decode_source, launch);
  const uint64_t K = p.x.cols, N = p.weight.rows;
  set_grid(launch, LANES * DECODE_SIMDGROUPS, ceil_div(N, c.rows));
  const uint32_t flags = (p.has_bias ? DECODE_HAS_BIAS : 0) | (p.save_h ? DECODE_SAVE_H : 0);
  set_arguments(
      launch,
      {{DECODE_K_N, pair(K, N)},
       {DECODE_RANK_ROWS, pair(p.lora_A.rows, c.rows)},
       {DECODE_X_LEVELS, levels(p.x)},
       {DECODE_X_STRIDES, strides(p.x)},
       {DECODE_W_STRIDES, strides(p.weight)},
       {DECODE_A_STRIDES, strides(p.lora_A)},
       {DECODE_B_STRIDES, strides(p.lora_B)},
       {DECODE_FLAGS_BIAS_STRIDE, pair(flags, p.bias_stride)}});
  return plan;
}

}  // namespace torch_fused_lora
