// The shim for codegen.py. What is one operation of a simdgroup or of a GPU is declared here and defined nowhere: the
// optimiser sees values go in and a value come out, and nothing of how the executor does it.
#pragma once

#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma clang attribute push(__attribute__((always_inline)), apply_to = function)

// The shim's own loops go over the components of a vector: they are none on a GPU.
#define for _Pragma("clang loop unroll(full)") for
#include "../shim/types.h"
#include "../shim/math.h"
#include "../shim/launch.h"
#undef for

namespace metal {

namespace opaque {
using Elements = vec<float, 64>;  // a whole simdgroup_matrix: no address, no loop, nothing to take apart
__attribute__((const)) Elements fill(float value);
__attribute__((const)) Elements multiply_accumulate(Elements a, Elements b, Elements c);
template <typename Pointer>
__attribute__((pure)) Elements load(Pointer source, ulong elements_per_row, ulong2 origin, bool transpose);
template <typename Pointer>
void store(Elements elements, Pointer target, ulong elements_per_row, ulong2 origin, bool transpose);
template <uint site> __attribute__((const)) threadgroup void* threadgroup_variable();
}  // namespace opaque

namespace executor {
template <typename T, uint site> threadgroup T& threadgroup_variable() {
  return *(threadgroup T*)opaque::threadgroup_variable<site>();
}
}  // namespace executor

// A barrier may change all memory but a thread's own, whose address nobody has.
void threadgroup_barrier(mem_flags flags);
void simdgroup_barrier(mem_flags flags);

template <typename T> __attribute__((const)) T simd_sum(T x);
template <typename T> __attribute__((const)) T simd_max(T x);
template <typename T> __attribute__((const)) T simd_broadcast_first(T x);

template <typename T, int Cols, int Rows> struct simdgroup_matrix {
  opaque::Elements elements;
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;

template <typename T, int Cols, int Rows> simdgroup_matrix<T, Cols, Rows> make_filled_simdgroup_matrix(T value) {
  return {opaque::fill(value)};
}
template <typename T>
void simdgroup_load(
    simdgroup_matrix<T, 8, 8>& matrix,
    const threadgroup T* source,
    ulong elements_per_row = 8,
    ulong2 origin = (ulong2)(0),
    bool transpose = false) {
  matrix.elements = opaque::load(source, elements_per_row, origin, transpose);
}
template <typename T>
void simdgroup_store(
    simdgroup_matrix<T, 8, 8> matrix,
    threadgroup T* target,
    ulong elements_per_row = 8,
    ulong2 origin = (ulong2)(0),
    bool transpose = false) {
  opaque::store(matrix.elements, target, elements_per_row, origin, transpose);
}
template <typename D, typename A, typename B, typename C>
void simdgroup_multiply_accumulate(
    simdgroup_matrix<D, 8, 8>& d,
    simdgroup_matrix<A, 8, 8> a,
    simdgroup_matrix<B, 8, 8> b,
    simdgroup_matrix<C, 8, 8> c) {
  d.elements = opaque::multiply_accumulate(a.elements, b.elements, c.elements);
}

}  // namespace metal
#pragma clang attribute pop
