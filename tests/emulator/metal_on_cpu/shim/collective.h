// What a simdgroup does together, each as one collective operation of the runtime: simdgroup.h and simdgroup_matrix.h
// say what is meant.
#pragma once

namespace metal {
namespace executor {

template <typename T> struct Shuffle {
  T value;
  uint source;
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

// A butterfly over the lanes that exist, as hardware does it.
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
template <typename Operator, typename T> AT_CALLER T reduce(T value) { return collective<Reduce<Operator, T>>(value); }

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
template <typename Operator, bool inclusive, typename T> AT_CALLER T prefix(T value) {
  return collective<Prefix<Operator, T, inclusive>>(value);
}

// Placements that differ: the lanes have diverged.
struct Agree {
  static void run(Frames<Placement> frames) {
    for (int lane = 1; lane < simd_width; ++lane) {
      if (frames.has(lane) &&
          (frames[lane].start != frames[0].start || frames[lane].row != frames[0].row ||
           frames[lane].column != frames[0].column)) {
        return executor_pointers_differ();
      }
    }
  }
};
AT_CALLER inline Placement agreed(Placement placement) { return collective<Agree>(placement); }

template <typename D, typename A, typename B, typename C> struct MultiplyFrame {
  vec<D, 2> d;
  vec<A, 2> a;
  vec<B, 2> b;
  vec<C, 2> c;
  struct Multiply {
    static void run(Frames<MultiplyFrame> frames) {
      float a[8][8], b[8][8], d[8][8];
      for (int lane = 0; lane < simd_width; ++lane) {
        const uint row = matrix_row(lane), column = matrix_column(lane);
        for (int i = 0; i < 2; ++i) {
          a[row][column + i] = frames.has(lane) ? float(frames[lane].a[i]) : __builtin_nanf("");
          b[row][column + i] = frames.has(lane) ? float(frames[lane].b[i]) : __builtin_nanf("");
          d[row][column + i] = frames.has(lane) ? float(frames[lane].c[i]) : __builtin_nanf("");
        }
      }
      for (int row = 0; row < 8; ++row) {
        for (int k = 0; k < 8; ++k) {
          for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
        }
      }
      for (int lane = 0; lane < simd_width; ++lane) {
        if (!frames.has(lane)) continue;
        const uint row = matrix_row(lane), column = matrix_column(lane);
        for (int i = 0; i < 2; ++i) frames[lane].d[i] = D(d[row][column + i]);
      }
    }
  };
};
template <typename D, typename A, typename B, typename C>
AT_CALLER vec<D, 2> multiply_accumulate(vec<A, 2> a, vec<B, 2> b, vec<C, 2> c) {
  using Frame = MultiplyFrame<D, A, B, C>;
  return collective<typename Frame::Multiply>(Frame{vec<D, 2>{}, a, b, c}, true).d;
}

}  // namespace executor
}  // namespace metal
