// SIMD-group functions. Every lane must call them: a call that some lanes skip is reported as divergent.
#pragma once

extern "C" uint executor_lane();

namespace metal {
namespace executor {

inline constexpr int simd_width = 32;

// What these functions take: numbers of up to 32 bits and vectors of them, but neither bool nor bfloat.
template <typename T> inline constexpr bool is_simd_element =
    is_arithmetic_v<T> && sizeof(T) <= 4 && !__is_same(T, bool) && !__is_same(T, bfloat);
template <typename T> using simd_value = enable_if_t<is_simd_element<element_of<T>>, T>;

// What executes the lanes provides these: collective.h on a CPU, metal_on_gpu/shim/executor.h on a GPU.
// `source`: the lane to read; one that does not exist leaves the value as it is.
template <typename T> T shuffle(T value, uint source);
// Of all lanes, as a butterfly: the order of the sum does not depend on who runs first.
template <typename Operator, typename T> T reduce(T value);
template <typename Operator, bool inclusive, typename T> T prefix(T value);

struct Sum {
  template <typename T> static T apply(T a, T b) { return a + b; }
  template <typename T> static T identity() { return T(0); }
};
struct Product {
  template <typename T> static T apply(T a, T b) { return a * b; }
  template <typename T> static T identity() { return T(1); }
};
// clang-format off
struct Min { template <typename T> static T apply(T a, T b) { return metal::min(a, b); } };
struct Max { template <typename T> static T apply(T a, T b) { return metal::max(a, b); } };
struct And { template <typename T> static T apply(T a, T b) { return a & b; } };
struct Or { template <typename T> static T apply(T a, T b) { return a | b; } };
struct Xor { template <typename T> static T apply(T a, T b) { return a ^ b; } };
// clang-format on

}  // namespace executor

template <typename T>
AT_CALLER executor::simd_value<T> simd_sum(T x) {
  return executor::reduce<executor::Sum>(x);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_product(T x) {
  return executor::reduce<executor::Product>(x);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_min(T x) {
  return executor::reduce<executor::Min>(x);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_max(T x) {
  return executor::reduce<executor::Max>(x);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_and(T x) {
  return executor::reduce<executor::And>(x);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_or(T x) {
  return executor::reduce<executor::Or>(x);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_xor(T x) {
  return executor::reduce<executor::Xor>(x);
}
AT_CALLER inline bool simd_all(bool x) { return simd_and(uint(x)); }
AT_CALLER inline bool simd_any(bool x) { return simd_or(uint(x)); }

template <typename T>
AT_CALLER executor::simd_value<T> simd_prefix_inclusive_sum(T x) {
  return executor::prefix<executor::Sum, true>(x);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_prefix_exclusive_sum(T x) {
  return executor::prefix<executor::Sum, false>(x);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_prefix_inclusive_product(T x) {
  return executor::prefix<executor::Product, true>(x);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_prefix_exclusive_product(T x) {
  return executor::prefix<executor::Product, false>(x);
}

template <typename T>
AT_CALLER executor::simd_value<T> simd_shuffle(T x, ushort lane) {
  return executor::shuffle(x, lane);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_broadcast(T x, ushort lane) {
  return executor::shuffle(x, lane);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_broadcast_first(T x) {
  return executor::shuffle(x, 0);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_shuffle_xor(T x, ushort mask) {
  return executor::shuffle(x, executor_lane() ^ mask);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_shuffle_up(T x, ushort delta) {
  return executor::shuffle(x, executor_lane() - delta);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_shuffle_down(T x, ushort delta) {
  return executor::shuffle(x, executor_lane() + delta);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_shuffle_rotate_up(T x, ushort delta) {
  return executor::shuffle(x, (executor_lane() - delta) % executor::simd_width);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_shuffle_rotate_down(T x, ushort delta) {
  return executor::shuffle(x, (executor_lane() + delta) % executor::simd_width);
}
// Lanes that would read beyond the simdgroup read the other end of `filling`.
template <typename T> AT_CALLER executor::simd_value<T> simd_shuffle_and_fill_up(T x, T filling, ushort delta) {
  const T shifted = simd_shuffle_up(x, delta), filled = simd_shuffle_rotate_up(filling, delta);
  return executor_lane() < delta ? filled : shifted;
}
template <typename T> AT_CALLER executor::simd_value<T> simd_shuffle_and_fill_down(T x, T filling, ushort delta) {
  const T shifted = simd_shuffle_down(x, delta), filled = simd_shuffle_rotate_down(filling, delta);
  return executor_lane() + delta >= executor::simd_width ? filled : shifted;
}
AT_CALLER inline bool simd_is_first() { return executor_lane() == 0; }

template <typename T>
AT_CALLER executor::simd_value<T> quad_shuffle_xor(T x, ushort mask) {
  return executor::shuffle(x, executor_lane() ^ (mask & 3));
}
template <typename T>
AT_CALLER executor::simd_value<T> quad_broadcast(T x, ushort lane) {
  return executor::shuffle(x, (executor_lane() & ~3u) | (lane & 3));
}
template <typename T> AT_CALLER executor::simd_value<T> quad_sum(T x) {
  x += quad_shuffle_xor(x, 1);
  return x + quad_shuffle_xor(x, 2);
}
template <typename T> AT_CALLER executor::simd_value<T> quad_max(T x) {
  x = max(x, quad_shuffle_xor(x, 1));
  return max(x, quad_shuffle_xor(x, 2));
}

class simd_vote {
 public:
  using vote_t = ulong;
  explicit simd_vote(vote_t votes) : votes_(votes) {}
  explicit operator vote_t() const { return votes_; }
  bool any() const { return votes_ != 0; }
  bool all() const { return votes_ == 0xffffffff; }

 private:
  vote_t votes_;
};
AT_CALLER inline simd_vote simd_ballot(bool x) { return simd_vote(simd_or(uint(x) << executor_lane())); }

}  // namespace metal
