// Launch configurations: the numbers that a plan chooses for a kernel, as a struct a kernel. A field is one member and
// one line of `fields`; the plan's chooser gives it a value, and printing, overriding and tuning then know it.
#pragma once

#include <compare>
#include <cstdint>
#include <optional>
#include <string>

#include "launch.h"

namespace torch_fused_lora {

template <typename Configuration>
struct Field {
  using Member = uint32_t Configuration::*;

  const char* name;
  Member member;
  uint32_t allowed[5] = {};  // what an override may say; none: any number from 1 on
  bool follows = false;      // from the problem or from other fields: cannot be overridden
};

constexpr uint32_t kTried[5] = {1, 2, 4, 8, 16};  // what is tuned of a field that allows any number

/// Of a layer as a whole.
struct LayerConfiguration {
  uint32_t way;  // 1: these kernels, 2: torch's own products; chosen by overrides alone

  static constexpr Field<LayerConfiguration> fields[] = {{"way", &LayerConfiguration::way, {1, 2}}};
};

struct DecodeConfiguration {
  uint32_t slices;      // simdgroups of a threadgroup that share rows of W
  uint32_t dispatches;  // 2: h in one of its own

  static constexpr Field<DecodeConfiguration> fields[] = {
      {"slices", &DecodeConfiguration::slices, {1, 2, 4, 8}}, {"dispatches", &DecodeConfiguration::dispatches, {1, 2}}};
};

struct DeltaConfiguration {
  uint32_t rank_blocks, width;   // of the tiles of x: ranks / BLOCK, columns
  uint32_t row_blocks;           // of a threadgroup
  uint32_t up_row_blocks;        // in the second dispatch
  uint32_t k_splits, k_columns;  // threadgroups that share the columns of x, and how many each has
  uint32_t splits, columns;      // threadgroups that share the columns of y, and how many each has

  static constexpr Field<DeltaConfiguration> fields[] = {
      {"rank_blocks", &DeltaConfiguration::rank_blocks, {}, true},
      {"width", &DeltaConfiguration::width, {}, true},
      {"row_blocks", &DeltaConfiguration::row_blocks, {1, 2, 4}},
      {"up_row_blocks", &DeltaConfiguration::up_row_blocks, {}, true},
      {"k_splits", &DeltaConfiguration::k_splits},
      {"k_columns", &DeltaConfiguration::k_columns, {}, true},
      {"splits", &DeltaConfiguration::splits},
      {"columns", &DeltaConfiguration::columns, {}, true}};
};

struct GemmConfiguration {
  uint32_t rows;           // of a threadgroup
  uint32_t splits, terms;  // threadgroups that share the sums of the base product, and the length each has
  uint32_t plain;          // 1: a half base goes this way, too; chosen by overrides alone

  static constexpr Field<GemmConfiguration> fields[] = {
      {"rows", &GemmConfiguration::rows, {32, 64}},
      {"splits", &GemmConfiguration::splits},
      {"terms", &GemmConfiguration::terms, {}, true},
      {"plain", &GemmConfiguration::plain, {1}}};
};

struct GradConfiguration {
  uint32_t rank_blocks, columns, depth;  // of a threadgroup's tiles
  uint32_t splits, split_rows;           // threadgroups that share the rows, and how many each has

  static constexpr Field<GradConfiguration> fields[] = {
      {"rank_blocks", &GradConfiguration::rank_blocks, {}, true},
      {"columns", &GradConfiguration::columns, {}, true},
      {"depth", &GradConfiguration::depth, {}, true},
      {"splits", &GradConfiguration::splits},
      {"split_rows", &GradConfiguration::split_rows, {}, true}};
};

/// Of rms_norm, softmax and their backwards.
struct RowConfiguration {
  uint32_t row_simdgroups;  // that share a row
  uint32_t rows;            // that a threadgroup has at once
  uint32_t held;            // 1: a row is kept in registers, 0: looped over
  uint32_t groups;          // threadgroups, which walk over the rows

  static constexpr Field<RowConfiguration> fields[] = {
      {"row_simdgroups", &RowConfiguration::row_simdgroups, {1, 2, 4, 8, 16}},
      {"rows", &RowConfiguration::rows, {1, 2, 4, 8, 16}},
      {"held", &RowConfiguration::held, {}, true},
      {"groups", &RowConfiguration::groups}};
};

/// What overrides the choosers, zero where nothing does.
struct Overrides {
  LayerConfiguration lora_linear;
  DecodeConfiguration lora_decode;
  DeltaConfiguration lora_delta;
  GemmConfiguration lora_gemm;
  GradConfiguration lora_grad;
  RowConfiguration rms_norm, rms_norm_backward, softmax, softmax_backward;

  /// The kernels by their names: `visit(name, member)` until it returns true.
  template <typename Visit>
  static bool any(const Visit& visit) {
    return visit("lora_linear", &Overrides::lora_linear) || visit("lora_decode", &Overrides::lora_decode) ||
        visit("lora_delta", &Overrides::lora_delta) || visit("lora_gemm", &Overrides::lora_gemm) ||
        visit("lora_grad", &Overrides::lora_grad) || visit("rms_norm", &Overrides::rms_norm) ||
        visit("rms_norm_backward", &Overrides::rms_norm_backward) || visit("softmax", &Overrides::softmax) ||
        visit("softmax_backward", &Overrides::softmax_backward);
  }
};

/// Reads "lora_delta.splits=4,lora_decode.slices=2", an empty text for none. A number is taken as far as a problem has
/// room for it. Throws std::invalid_argument, naming what is wrong and what is allowed. To be called before the first
/// plan is made.
void set_overrides(const std::string& text);

/// The kernels' fields that can be overridden, each with the numbers that are tuned, as JSON.
std::string candidates();

/// A layer of lora_linear in one direction, without dropout, as configurations are tuned for it. Layers with the same
/// power of two at or above M share one.
struct Layer {
  bool backward;
  uint64_t M, K, N, r;
  Scalar dtype, adapter_dtype;

  auto operator<=>(const Layer&) const = default;
};

/// Overrides for one layer, written as for `set_overrides`; an empty text for none. Throws std::invalid_argument for
/// what is not among the candidates.
void tune(const Layer& layer, const std::string& text);

/// While it lives, `overrides()` in this thread are those tuned for the layer, if there are any.
class Tuned {
 public:
  explicit Tuned(const Layer& layer, bool ignored = false);
  ~Tuned();
  Tuned(const Tuned&) = delete;

 private:
  const Overrides* outer_;
  std::optional<Overrides> own_;
};

const Overrides& overrides();

/// A chooser's number, unless it is overridden.
inline uint32_t unless(uint32_t overridden, uint64_t chosen) {
  return overridden > 0 ? overridden : static_cast<uint32_t>(chosen);
}

}  // namespace torch_fused_lora
