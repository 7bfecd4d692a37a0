// Math, integer, common and relational functions. All work on scalars and vectors.
#pragma once

namespace metal {

// What kernels use most is, as in Metal, a set of overloads, one for each type: a call whose arguments have several
// types (min(uint, int), fma(float, float, half)) or a type without an overload (rsqrt(uint)) is ambiguous, and a
// scalar among vectors is spread over one. There are none of bfloat, as MLX declares its own in this namespace; whether
// Metal then takes exp(bfloat) as exp(float), as here, is not known. A template below takes arguments of one type:
// Metal takes more.
#define WIDTHS(OVERLOAD, name, builtin, scalar) \
  OVERLOAD(name, builtin, scalar)               \
  OVERLOAD(name, builtin, scalar##2)            \
  OVERLOAD(name, builtin, scalar##3)            \
  OVERLOAD(name, builtin, scalar##4)
#define FLOATS(OVERLOAD, name, builtin) \
  WIDTHS(OVERLOAD, name, builtin, half) \
  WIDTHS(OVERLOAD, name, builtin, float)
#define SIGNED(OVERLOAD, name, builtin)  \
  WIDTHS(OVERLOAD, name, builtin, char)  \
  WIDTHS(OVERLOAD, name, builtin, short) \
  WIDTHS(OVERLOAD, name, builtin, int)   \
  WIDTHS(OVERLOAD, name, builtin, long)
#define UNSIGNED(OVERLOAD, name, builtin) \
  WIDTHS(OVERLOAD, name, builtin, uchar)  \
  WIDTHS(OVERLOAD, name, builtin, ushort) \
  WIDTHS(OVERLOAD, name, builtin, uint)   \
  WIDTHS(OVERLOAD, name, builtin, ulong)
#define INTEGERS(OVERLOAD, name, builtin) SIGNED(OVERLOAD, name, builtin) UNSIGNED(OVERLOAD, name, builtin)
#define NUMBERS(OVERLOAD, name, builtin) INTEGERS(OVERLOAD, name, builtin) FLOATS(OVERLOAD, name, builtin)
#define UNARY(name, builtin, T) \
  inline T name(T x) { return builtin(x); }
#define BINARY(name, builtin, T) \
  inline T name(T x, T y) { return builtin(x, y); }
#define TERNARY(name, builtin, T) \
  inline T name(T x, T y, T z) { return builtin(x, y, z); }

namespace executor {
template <typename T> T clamp(T x, T low, T high) {
  return __builtin_elementwise_min(__builtin_elementwise_max(x, low), high);
}
template <typename T> T rsqrt(T x) { return T(1) / __builtin_elementwise_sqrt(x); }
template <typename T> T rotate(T x, T bits) {
  const T modulus = T(sizeof(element_of<T>) * 8), left = bits % modulus;
  return (x << left) | (x >> ((modulus - left) % modulus) & ~(T(-1) << left));  // >> copies the sign of a signed x
}
}  // namespace executor

SIGNED(UNARY, abs, __builtin_elementwise_abs)
UNSIGNED(UNARY, abs, )
FLOATS(UNARY, abs, __builtin_elementwise_abs)
NUMBERS(BINARY, min, __builtin_elementwise_min)
NUMBERS(BINARY, max, __builtin_elementwise_max)
NUMBERS(TERNARY, clamp, executor::clamp)
INTEGERS(BINARY, rotate, executor::rotate)
template <typename T> T min3(T x, T y, T z) { return min(x, min(y, z)); }
template <typename T> T max3(T x, T y, T z) { return max(x, max(y, z)); }

#define MATH                                               \
  FLOATS(UNARY, fabs, __builtin_elementwise_abs)           \
  FLOATS(UNARY, acos, __builtin_elementwise_acos)          \
  FLOATS(UNARY, asin, __builtin_elementwise_asin)          \
  FLOATS(UNARY, atan, __builtin_elementwise_atan)          \
  FLOATS(UNARY, ceil, __builtin_elementwise_ceil)          \
  FLOATS(UNARY, cos, __builtin_elementwise_cos)            \
  FLOATS(UNARY, cosh, __builtin_elementwise_cosh)          \
  FLOATS(UNARY, exp, __builtin_elementwise_exp)            \
  FLOATS(UNARY, exp2, __builtin_elementwise_exp2)          \
  FLOATS(UNARY, exp10, __builtin_elementwise_exp10)        \
  FLOATS(UNARY, floor, __builtin_elementwise_floor)        \
  FLOATS(UNARY, log, __builtin_elementwise_log)            \
  FLOATS(UNARY, log2, __builtin_elementwise_log2)          \
  FLOATS(UNARY, log10, __builtin_elementwise_log10)        \
  FLOATS(UNARY, rint, __builtin_elementwise_roundeven)     \
  FLOATS(UNARY, round, __builtin_elementwise_round)        \
  FLOATS(UNARY, sin, __builtin_elementwise_sin)            \
  FLOATS(UNARY, sinh, __builtin_elementwise_sinh)          \
  FLOATS(UNARY, sqrt, __builtin_elementwise_sqrt)          \
  FLOATS(UNARY, tan, __builtin_elementwise_tan)            \
  FLOATS(UNARY, tanh, __builtin_elementwise_tanh)          \
  FLOATS(UNARY, trunc, __builtin_elementwise_trunc)        \
  FLOATS(BINARY, atan2, __builtin_elementwise_atan2)       \
  FLOATS(BINARY, copysign, __builtin_elementwise_copysign) \
  FLOATS(BINARY, fmin, __builtin_elementwise_min)          \
  FLOATS(BINARY, fmax, __builtin_elementwise_max)          \
  FLOATS(BINARY, fmod, __builtin_elementwise_fmod)         \
  FLOATS(BINARY, pow, __builtin_elementwise_pow)           \
  FLOATS(BINARY, powr, __builtin_elementwise_pow)          \
  FLOATS(UNARY, rsqrt, executor::rsqrt)                    \
  FLOATS(TERNARY, fma, __builtin_elementwise_fma)

// Metal's fast variants may be less exact; here all three are the precise ones.
MATH
namespace precise {
MATH
}
namespace fast {
MATH
}
#undef MATH

INTEGERS(UNARY, popcount, __builtin_elementwise_popcount)
INTEGERS(UNARY, reverse_bits, __builtin_elementwise_bitreverse)
template <typename T> auto isnan(T x) { return x != x; }
#undef TERNARY
#undef BINARY
#undef UNARY
#undef NUMBERS
#undef INTEGERS
#undef UNSIGNED
#undef SIGNED
#undef FLOATS
#undef WIDTHS

template <typename T>
T clz(T x) {
  return x ? T(sizeof(T) * 8 - 1 - (63 - __builtin_clzl(ulong(x)))) : T(sizeof(T) * 8);
}
template <typename T> T ctz(T x) { return x ? T(__builtin_ctzl(ulong(x))) : T(sizeof(T) * 8); }
template <typename T> T mad24(T x, T y, T z) { return x * y + z; }
template <typename T> T absdiff(T x, T y) { return x > y ? x - y : y - x; }

namespace executor {
// clang-format off
template <typename T> struct wider;
template <> struct wider<int> { using type = long; };
template <> struct wider<uint> { using type = ulong; };
template <> struct wider<short> { using type = int; };
template <> struct wider<ushort> { using type = uint; };
template <typename T> struct wider<T __attribute__((ext_vector_type(2)))> { using type = vec<typename wider<T>::type, 2>; };
template <typename T> struct wider<T __attribute__((ext_vector_type(3)))> { using type = vec<typename wider<T>::type, 3>; };
template <typename T> struct wider<T __attribute__((ext_vector_type(4)))> { using type = vec<typename wider<T>::type, 4>; };
// clang-format on
}  // namespace executor

template <typename T> T mulhi(T x, T y) {
  if constexpr (__is_same(T, ulong)) {
    const ulong low = 0xffffffff, a = x >> 32, b = x & low, c = y >> 32, d = y & low;
    const ulong middle = a * d + (b * d >> 32), other = b * c + (middle & low);
    return a * c + (middle >> 32) + (other >> 32);
  } else {
    using Wide = typename executor::wider<T>::type;
    return executor::cast<T>(
        (executor::cast<Wide>(x) * executor::cast<Wide>(y)) >> int(sizeof(executor::element_of<T>) * 8));
  }
}

// Comparisons of vectors give integer vectors of 0 and -1 here; select, any and all take them.
template <typename T, typename C> T select(T no, T yes, C condition) { return condition ? yes : no; }
template <typename C> bool any(C condition) {
  if constexpr (executor::is_vector<C>) {
    bool result = false;
    for (int i = 0; i < executor::vector_traits<C>::size; ++i) result |= condition[i] != 0;
    return result;
  } else {
    return condition;
  }
}
template <typename C> bool all(C condition) {
  if constexpr (executor::is_vector<C>) {
    bool result = true;
    for (int i = 0; i < executor::vector_traits<C>::size; ++i) result &= condition[i] != 0;
    return result;
  } else {
    return condition;
  }
}

template <typename T> auto isinf(T x) { return fabs(x) == T(__builtin_inff()); }
template <typename T> auto isfinite(T x) { return fabs(x) < T(__builtin_inff()); }
template <typename T> auto signbit(T x) { return copysign(T(1), x) < T(0); }
template <typename T> T fract(T x) { return min(x - floor(x), T(0x1.fffffep-1f)); }
template <typename T> T saturate(T x) { return clamp(x, T(0), T(1)); }
template <typename T> T mix(T x, T y, T a) { return x + (y - x) * a; }
template <typename T> T step(T edge, T x) { return x < edge ? T(0) : T(1); }
template <typename T> T sign(T x) { return x > T(0) ? T(1) : x < T(0) ? T(-1) : x; }
template <typename T> T divide(T x, T y) { return x / y; }

// Of half and float only.
template <
    typename V,
    typename = enable_if_t<__is_same(executor::element_of<V>, half) || __is_same(executor::element_of<V>, float)>>
executor::element_of<V> dot(V x, V y) {
  executor::element_of<V> sum = x[0] * y[0];
  for (int i = 1; i < executor::vector_traits<V>::size; ++i) sum += x[i] * y[i];
  return sum;
}
template <typename V> executor::element_of<V> length_squared(V x) { return dot(x, x); }
template <typename V> executor::element_of<V> length(V x) { return sqrt(dot(x, x)); }
template <typename V> executor::element_of<V> distance(V x, V y) { return length(x - y); }
template <typename V> V normalize(V x) { return x * rsqrt(dot(x, x)); }
template <typename T> vec<T, 3> cross(vec<T, 3> x, vec<T, 3> y) { return x.yzx * y.zxy - x.zxy * y.yzx; }

}  // namespace metal
