// Scalar and vector types, conversions between them, as_type.
#pragma once

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __bf16 bfloat;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef __UINTPTR_TYPE__ uintptr_t;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;

#define VECTORS(scalar)                                                          \
  typedef scalar scalar##2 __attribute__((ext_vector_type(2)));                  \
  typedef scalar scalar##3 __attribute__((ext_vector_type(3)));                  \
  typedef scalar scalar##4 __attribute__((ext_vector_type(4)));                  \
  typedef scalar##2 packed_##scalar##2 __attribute__((aligned(sizeof(scalar)))); \
  typedef scalar##4 packed_##scalar##4 __attribute__((aligned(sizeof(scalar))));
VECTORS(char)
VECTORS(uchar)
VECTORS(short)
VECTORS(ushort)
VECTORS(int)
VECTORS(uint)
VECTORS(long)
VECTORS(ulong)
VECTORS(half)
VECTORS(bfloat)
VECTORS(float)
#undef VECTORS

namespace metal {

template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));

// clang-format off
template <bool B, typename T = void> struct enable_if {};
template <typename T> struct enable_if<true, T> { using type = T; };
template <bool B, typename T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, typename T, typename F> struct conditional { using type = T; };
template <typename T, typename F> struct conditional<false, T, F> { using type = F; };
template <bool B, typename T, typename F> using conditional_t = typename conditional<B, T, F>::type;
template <typename T, T V> struct integral_constant {
    static constexpr T value = V;
    using value_type = T;
    constexpr operator T() const { return V; }
};
template <bool V> using bool_constant = integral_constant<bool, V>;
using true_type = integral_constant<bool, true>;
using false_type = integral_constant<bool, false>;
template <typename T, typename U> struct is_same : integral_constant<bool, __is_same(T, U)> {};
template <typename T, typename U> inline constexpr bool is_same_v = __is_same(T, U);
template <typename T> inline constexpr bool is_integral_v = __is_integral(T);
template <typename T> inline constexpr bool is_floating_point_v = __is_floating_point(T) || __is_same(T, half) || __is_same(T, bfloat);
template <typename T> struct is_integral : integral_constant<bool, is_integral_v<T>> {};
template <typename T> struct is_floating_point : integral_constant<bool, is_floating_point_v<T>> {};
template <typename From, typename To> inline constexpr bool is_convertible_v = __is_convertible(From, To);
template <typename T> inline constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <typename T> struct remove_cv { using type = __remove_cv(T); };
template <typename T> using remove_cv_t = __remove_cv(T);
template <typename T> struct remove_addrspace { using type = T; };
template <typename T> struct remove_addrspace<device T> { using type = T; };
template <typename T> struct remove_addrspace<constant T> { using type = T; };
template <typename T> struct remove_addrspace<threadgroup T> { using type = T; };
template <typename T> struct remove_addrspace<__private T> { using type = T; };
template <typename T> using remove_addrspace_t = typename remove_addrspace<T>::type;
template <typename T> using remove_reference_t = __remove_reference_t(T);
// clang-format on

template <typename T> struct numeric_limits;
#define LIMITS(type, lowest_value, max_value)                              \
  template <> struct numeric_limits<type> {                                \
    static constexpr type lowest() { return lowest_value; }                \
    static constexpr type max() { return max_value; }                      \
    static constexpr type infinity() { return type(__builtin_inff()); }    \
    static constexpr type quiet_NaN() { return type(__builtin_nanf("")); } \
  };
LIMITS(float, -0x1.fffffep127f, 0x1.fffffep127f)
LIMITS(half, half(-65504.0f), half(65504.0f))
LIMITS(bfloat, bfloat(-0x1.fep127f), bfloat(0x1.fep127f))
#undef LIMITS
#define LIMITS(type, low, high)                    \
  template <> struct numeric_limits<type> {        \
    static constexpr type min() { return low; }    \
    static constexpr type lowest() { return low; } \
    static constexpr type max() { return high; }   \
  };
LIMITS(char, -128, 127)
LIMITS(int8_t, -128, 127)
LIMITS(uchar, 0, 255)
LIMITS(short, -32768, 32767)
LIMITS(ushort, 0, 65535)
LIMITS(int, -2147483647 - 1, 2147483647)
LIMITS(uint, 0, 4294967295u)
LIMITS(long, -9223372036854775807l - 1l, 9223372036854775807l)
LIMITS(ulong, 0, 18446744073709551615ul)
#undef LIMITS

namespace executor {

template <typename T> struct vector_traits {
  using element = T;
  static constexpr int size = 1;
  static constexpr bool is_vector = false;
};
template <typename T, int N> struct vector_traits<T __attribute__((ext_vector_type(N)))> {
  using element = T;
  static constexpr int size = N;
  static constexpr bool is_vector = true;
};
template <typename T> using element_of = typename vector_traits<T>::element;
template <typename T> inline constexpr bool is_vector = vector_traits<T>::is_vector;

// static_cast as Metal has it: also between vectors of one length, and from a scalar to all components.
template <typename To, typename From> constexpr To cast(From value) {
  if constexpr (is_vector<To> && is_vector<From>) {
    return __builtin_convertvector(value, To);
  } else if constexpr (is_vector<To>) {
    return (To)(static_cast<element_of<To>>(value));
  } else {
    return static_cast<To>(value);
  }
}

template <typename V, typename A> constexpr void append(V& vector, int& position, A value) {
  if constexpr (is_vector<A>) {
    for (int i = 0; i < vector_traits<A>::size; ++i) vector[position++] = static_cast<element_of<V>>(value[i]);
  } else {
    vector[position++] = static_cast<element_of<V>>(value);
  }
}

// T(values...): Metal's constructor syntax, which clang has not for vectors.
template <typename T, typename... A> constexpr T make(A... values) {
  if constexpr (sizeof...(A) == 0) {
    return T{};
  } else if constexpr (!is_vector<T>) {
    return T(values...);
  } else if constexpr (sizeof...(A) == 1) {
    return cast<T>(values...);
  } else if constexpr ((is_vector<A> || ...)) {
    static_assert((vector_traits<A>::size + ...) == vector_traits<T>::size, "wrong number of vector components");
    T vector{};
    int position = 0;
    (append<T>(vector, position, values), ...);
    return vector;
  } else {
    static_assert(sizeof...(A) == vector_traits<T>::size, "wrong number of vector components");
    return T{static_cast<element_of<T>>(values)...};
  }
}

}  // namespace executor

// What a barrier orders.
enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16,
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
constexpr mem_flags operator&(mem_flags a, mem_flags b) { return mem_flags(uint(a) & uint(b)); }

// A value that all threads share: a hint to Metal's compiler.
template <typename T> using uniform = T;
template <typename T> constexpr T make_uniform(T value) { return value; }

}  // namespace metal

// An operator of the language, no member of metal.
template <typename To, typename From> constexpr To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type between types of different size");
  return __builtin_bit_cast(To, value);
}
