// Math, integer, common and relational functions. All work on scalars and vectors.
#pragma once

namespace metal {

#define UNARY(name, builtin) \
    template <typename T> T name(T x) { return builtin(x); }
#define BINARY(name, builtin) \
    template <typename T> T name(T x, T y) { return builtin(x, y); }

UNARY(abs, __builtin_elementwise_abs)
BINARY(min, __builtin_elementwise_min)
BINARY(max, __builtin_elementwise_max)
template <typename T> T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <typename T> T min3(T x, T y, T z) { return min(x, min(y, z)); }
template <typename T> T max3(T x, T y, T z) { return max(x, max(y, z)); }

#define MATH                                        \
    UNARY(fabs, __builtin_elementwise_abs)          \
    UNARY(acos, __builtin_elementwise_acos)         \
    UNARY(asin, __builtin_elementwise_asin)         \
    UNARY(atan, __builtin_elementwise_atan)         \
    UNARY(ceil, __builtin_elementwise_ceil)         \
    UNARY(cos, __builtin_elementwise_cos)           \
    UNARY(cosh, __builtin_elementwise_cosh)         \
    UNARY(exp, __builtin_elementwise_exp)           \
    UNARY(exp2, __builtin_elementwise_exp2)         \
    UNARY(exp10, __builtin_elementwise_exp10)       \
    UNARY(floor, __builtin_elementwise_floor)       \
    UNARY(log, __builtin_elementwise_log)           \
    UNARY(log2, __builtin_elementwise_log2)         \
    UNARY(log10, __builtin_elementwise_log10)       \
    UNARY(rint, __builtin_elementwise_roundeven)    \
    UNARY(round, __builtin_elementwise_round)       \
    UNARY(sin, __builtin_elementwise_sin)           \
    UNARY(sinh, __builtin_elementwise_sinh)         \
    UNARY(sqrt, __builtin_elementwise_sqrt)         \
    UNARY(tan, __builtin_elementwise_tan)           \
    UNARY(tanh, __builtin_elementwise_tanh)         \
    UNARY(trunc, __builtin_elementwise_trunc)       \
    BINARY(atan2, __builtin_elementwise_atan2)      \
    BINARY(copysign, __builtin_elementwise_copysign) \
    BINARY(fmin, __builtin_elementwise_min)         \
    BINARY(fmax, __builtin_elementwise_max)         \
    BINARY(fmod, __builtin_elementwise_fmod)        \
    BINARY(pow, __builtin_elementwise_pow)          \
    BINARY(powr, __builtin_elementwise_pow)         \
    template <typename T> T rsqrt(T x) { return T(1) / __builtin_elementwise_sqrt(x); } \
    template <typename T> T fma(T x, T y, T z) { return __builtin_elementwise_fma(x, y, z); }

// Metal's fast variants may be less exact; here all three are the precise ones.
MATH
namespace precise { MATH }
namespace fast { MATH }
#undef MATH

UNARY(popcount, __builtin_elementwise_popcount)
UNARY(reverse_bits, __builtin_elementwise_bitreverse)
template <typename T> auto isnan(T x) { return x != x; }
#undef UNARY
#undef BINARY

template <typename T> T clz(T x) { return x ? T(sizeof(T) * 8 - 1 - (63 - __builtin_clzl(ulong(x)))) : T(sizeof(T) * 8); }
template <typename T> T ctz(T x) { return x ? T(__builtin_ctzl(ulong(x))) : T(sizeof(T) * 8); }
template <typename T> T rotate(T x, T bits) {
    const T modulus = T(sizeof(executor::element_of<T>) * 8), left = bits % modulus;
    return (x << left) | (x >> ((modulus - left) % modulus));
}
template <typename T> T mad24(T x, T y, T z) { return x * y + z; }
template <typename T> T absdiff(T x, T y) { return x > y ? x - y : y - x; }

namespace executor {
template <typename T> struct wider;
template <> struct wider<int> { using type = long; };
template <> struct wider<uint> { using type = ulong; };
template <> struct wider<short> { using type = int; };
template <> struct wider<ushort> { using type = uint; };
template <typename T> struct wider<T __attribute__((ext_vector_type(2)))> { using type = vec<typename wider<T>::type, 2>; };
template <typename T> struct wider<T __attribute__((ext_vector_type(3)))> { using type = vec<typename wider<T>::type, 3>; };
template <typename T> struct wider<T __attribute__((ext_vector_type(4)))> { using type = vec<typename wider<T>::type, 4>; };
}  // namespace executor

template <typename T> T mulhi(T x, T y) {
    if constexpr (__is_same(T, ulong)) {
        const ulong low = 0xffffffff, a = x >> 32, b = x & low, c = y >> 32, d = y & low;
        const ulong middle = a * d + (b * d >> 32), other = b * c + (middle & low);
        return a * c + (middle >> 32) + (other >> 32);
    } else {
        using Wide = typename executor::wider<T>::type;
        return executor::cast<T>((executor::cast<Wide>(x) * executor::cast<Wide>(y)) >> int(sizeof(executor::element_of<T>) * 8));
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

template <typename V> executor::element_of<V> dot(V x, V y) {
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
