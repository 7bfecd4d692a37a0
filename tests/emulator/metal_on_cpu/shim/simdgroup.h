// SIMD-group functions. Every lane must call them: a call that some lanes skip is reported as divergent.
#pragma once

namespace metal {
namespace executor {

// What these functions take: numbers of up to 32 bits and vectors of them, but neither bool nor bfloat.
template <typename T> inline constexpr bool is_simd_element =
    is_arithmetic_v<T> && sizeof(T) <= 4 && !__is_same(T, bool) && !__is_same(T, bfloat);
template <typename T> using simd_value = enable_if_t<is_simd_element<element_of<T>>, T>;

template <typename T> struct Shuffle {
  T value;
  uint source;  // lane to read; a lane that does not exist leaves the value as it is
  struct Gather {
    static void run(Frames<Shuffle> frames) {
      T values[simd_width];
      for (int lane = 0; lane < simd_width; ++lane) {
        if (frames.has(lane)) values[lane] = frames[lane].value;
      }
      for (int lane = 0; lane < simd_width; ++lane) {
        if (!frames.has(lane)) continue;
        const uint source = frames[lane].source;
        if (source < simd_width && frames.has(source)) frames[lane].value = values[source];
      }
    }
  };
};
template <typename T> AT_CALLER T shuffle(T value, uint source) {
  return collective<typename Shuffle<T>::Gather>(Shuffle<T>{value, source}).value;
}

// A butterfly over the lanes that exist, as hardware does it: the order of the sum does not depend on who runs first.
template <typename Operator, typename T> struct Reduce {
  static void run(Frames<T> frames) {
    T values[simd_width];
    bool has[simd_width];
    for (int lane = 0; lane < simd_width; ++lane) {
      has[lane] = frames.has(lane);
      if (has[lane]) values[lane] = frames[lane];
    }
    for (int stride = 1; stride < simd_width; stride *= 2) {
      for (int lane = 0; lane < simd_width; lane += 2 * stride) {
        if (has[lane + stride]) values[lane] = Operator::apply(values[lane], values[lane + stride]);
      }
    }
    for (int lane = 0; lane < simd_width; ++lane) {
      if (has[lane]) frames[lane] = values[0];
    }
  }
};

template <typename Operator, typename T, bool inclusive> struct Prefix {
  static void run(Frames<T> frames) {
    T sum = Operator::template identity<T>();
    for (int lane = 0; lane < simd_width; ++lane) {
      if (!frames.has(lane)) continue;
      const T next = Operator::apply(sum, frames[lane]);
      frames[lane] = inclusive ? next : sum;
      sum = next;
    }
  }
};

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
  return executor::collective<executor::Reduce<executor::Sum, T>>(x);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_product(T x) {
  return executor::collective<executor::Reduce<executor::Product, T>>(x);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_min(T x) {
  return executor::collective<executor::Reduce<executor::Min, T>>(x);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_max(T x) {
  return executor::collective<executor::Reduce<executor::Max, T>>(x);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_and(T x) {
  return executor::collective<executor::Reduce<executor::And, T>>(x);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_or(T x) {
  return executor::collective<executor::Reduce<executor::Or, T>>(x);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_xor(T x) {
  return executor::collective<executor::Reduce<executor::Xor, T>>(x);
}
AT_CALLER inline bool simd_all(bool x) { return simd_and(uint(x)); }
AT_CALLER inline bool simd_any(bool x) { return simd_or(uint(x)); }

template <typename T>
AT_CALLER executor::simd_value<T> simd_prefix_inclusive_sum(T x) {
  return executor::collective<executor::Prefix<executor::Sum, T, true>>(x);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_prefix_exclusive_sum(T x) {
  return executor::collective<executor::Prefix<executor::Sum, T, false>>(x);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_prefix_inclusive_product(T x) {
  return executor::collective<executor::Prefix<executor::Product, T, true>>(x);
}
template <typename T>
AT_CALLER executor::simd_value<T> simd_prefix_exclusive_product(T x) {
  return executor::collective<executor::Prefix<executor::Product, T, false>>(x);
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
