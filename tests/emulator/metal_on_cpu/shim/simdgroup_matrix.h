// 8x8 matrices that the 32 lanes of a simdgroup hold together, two elements each.
#pragma once

namespace metal {
namespace executor {

// Lane l holds row (l / 16) * 4 + (l / 2) % 4 and two columns from ((l / 8) % 2) * 4 + (l % 2) * 2.
#ifdef TENSOR_CORES  // lanes in the order of NVIDIA's
AT_CALLER constexpr uint matrix_row(uint lane) { return lane / 4; }
AT_CALLER constexpr uint matrix_column(uint lane) { return lane % 4 * 2; }
#else
AT_CALLER constexpr uint matrix_row(uint lane) { return lane / 16 * 4 + lane / 2 % 4; }
AT_CALLER constexpr uint matrix_column(uint lane) { return lane / 8 % 2 * 4 + lane % 2 * 2; }
#endif

// Where a lane's elements lie: the same for all lanes.
struct Placement {
  ulong start, row, column;
};

// What executes the lanes provides these, as it does those of simdgroup.h. `agreed`: its argument.
Placement agreed(Placement placement);
// a b + c, each sum in float, in ascending order, without fused rounding.
template <typename D, typename A, typename B, typename C>
vec<D, 2> multiply_accumulate(vec<A, 2> a, vec<B, 2> b, vec<C, 2> c);

}  // namespace executor

template <typename T, int Cols, int Rows> class simdgroup_matrix {
  static_assert(Cols == 8 && Rows == 8, "a simdgroup_matrix is 8x8");
  static_assert(is_floating_point_v<T>, "a simdgroup_matrix holds float, half or bfloat");

 public:
  using storage_type = vec<T, 2>;
  simdgroup_matrix() = default;
  AT_CALLER explicit simdgroup_matrix(T diagonal) {
    const uint row = executor_row(), column = executor_column();
    elements_ = storage_type{row == column ? diagonal : T(0), row == column + 1 ? diagonal : T(0)};
  }
  AT_CALLER storage_type& thread_elements() { return elements_; }
  AT_CALLER const storage_type& thread_elements() const { return elements_; }

  AT_CALLER static uint executor_row() { return executor::matrix_row(executor_lane()); }
  AT_CALLER static uint executor_column() { return executor::matrix_column(executor_lane()); }

 private:
  storage_type elements_;
};

using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

template <typename T, int Cols, int Rows>
AT_CALLER simdgroup_matrix<T, Cols, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Cols, Rows> matrix;
  matrix.thread_elements() = value;
  return matrix;
}

namespace executor {

template <typename T>
AT_CALLER Placement place(ulong address, ulong elements_per_row, ulong2 origin, bool transpose) {
  const ulong start = address + (origin.x + origin.y * elements_per_row) * sizeof(T);
  return agreed(transpose ? Placement{start, 1, elements_per_row} : Placement{start, elements_per_row, 1});
}

template <typename Pointer, typename T>
AT_CALLER void load(
    simdgroup_matrix<T, 8, 8>& matrix, Pointer source, ulong elements_per_row, ulong2 origin, bool transpose) {
  const Placement place = executor::place<T>((ulong)source, elements_per_row, origin, transpose);
  const ulong row = matrix.executor_row(), column = matrix.executor_column();
  const Pointer start = (Pointer)place.start;
  matrix.thread_elements()[0] = start[row * place.row + column * place.column];
  matrix.thread_elements()[1] = start[row * place.row + (column + 1) * place.column];
}

template <typename Pointer, typename T>
AT_CALLER void store(
    const simdgroup_matrix<T, 8, 8>& matrix, Pointer target, ulong elements_per_row, ulong2 origin, bool transpose) {
  const Placement place = executor::place<T>((ulong)target, elements_per_row, origin, transpose);
  const ulong row = matrix.executor_row(), column = matrix.executor_column();
  const Pointer start = (Pointer)place.start;
  start[row * place.row + column * place.column] = matrix.thread_elements()[0];
  start[row * place.row + (column + 1) * place.column] = matrix.thread_elements()[1];
}

}  // namespace executor

#define LOAD_STORE(space)                                                                   \
  template <typename T>                                                                     \
  AT_CALLER void simdgroup_load(                                                            \
      simdgroup_matrix<T, 8, 8>& matrix, const space T* source, ulong elements_per_row = 8, \
      ulong2 origin = (ulong2)(0), bool transpose = false) {                                \
    executor::load(matrix, source, elements_per_row, origin, transpose);                    \
  }                                                                                         \
  template <typename T>                                                                     \
  AT_CALLER void simdgroup_store(                                                           \
      const simdgroup_matrix<T, 8, 8>& matrix, space T* target, ulong elements_per_row = 8, \
      ulong2 origin = (ulong2)(0), bool transpose = false) {                                \
    executor::store(matrix, target, elements_per_row, origin, transpose);                   \
  }
LOAD_STORE(device)
LOAD_STORE(threadgroup)
#undef LOAD_STORE

// d = a b + c. Sums are taken in float, also of half and bfloat matrices. Apple documents the operands by thread& in
// one place and by value in another: a variable that is not const fits both, and only that is taken here.
template <typename D, typename A, typename B, typename C>
AT_CALLER void simdgroup_multiply_accumulate(
    simdgroup_matrix<D, 8, 8>& d,
    simdgroup_matrix<A, 8, 8>& a,
    simdgroup_matrix<B, 8, 8>& b,
    simdgroup_matrix<C, 8, 8>& c) {
  d.thread_elements() =
      executor::multiply_accumulate<D, A, B, C>(a.thread_elements(), b.thread_elements(), c.thread_elements());
}

template <typename D, typename A, typename B>
AT_CALLER void simdgroup_multiply(
    simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8>& a, simdgroup_matrix<B, 8, 8>& b) {
  auto zero = make_filled_simdgroup_matrix<D, 8, 8>(D(0));
  simdgroup_multiply_accumulate(d, a, b, zero);
}

}  // namespace metal
