// Atomic operations. Threads take turns here, so plain accesses are atomic; they are bounds-checked, not race-checked.
#pragma once

namespace metal {

enum memory_order { memory_order_relaxed };

template <typename T> struct atomic {
  T value;
};

namespace executor {
template <typename Atomic, typename F>
__attribute__((noinline, no_sanitize("kernel-address"))) auto exchange_value(Atomic object, F function) {
  const auto old = object->value;
  object->value = function(old);
  return old;
}
template <typename Atomic, typename F> AT_CALLER auto update(Atomic object, F function) {
  executor_atomic((const void*)&object->value, sizeof(object->value));
  return exchange_value(object, function);
}
}  // namespace executor

#define ATOMICS(space)                                                                                           \
  template <typename T> AT_CALLER T atomic_load_explicit(const volatile space atomic<T>* object, memory_order) { \
    return executor::update((volatile space atomic<T>*)object, [](T old) { return old; });                       \
  }                                                                                                              \
  template <typename T> AT_CALLER void atomic_store_explicit(                                                    \
      volatile space atomic<T>* object, T value, memory_order) {                                                 \
    executor::update(object, [=](T) { return value; });                                                          \
  }                                                                                                              \
  FETCH(space, atomic_exchange_explicit, value)                                                                  \
  FETCH(space, atomic_fetch_add_explicit, old + value)                                                           \
  FETCH(space, atomic_fetch_sub_explicit, old - value)                                                           \
  FETCH(space, atomic_fetch_min_explicit, min(old, value))                                                       \
  FETCH(space, atomic_fetch_max_explicit, max(old, value))                                                       \
  FETCH(space, atomic_fetch_and_explicit, old& value)                                                            \
  FETCH(space, atomic_fetch_or_explicit, old | value)                                                            \
  FETCH(space, atomic_fetch_xor_explicit, old ^ value)
#define FETCH(space, name, result)                                                                  \
  template <typename T> AT_CALLER T name(volatile space atomic<T>* object, T value, memory_order) { \
    return executor::update(object, [=](T old) { return T(result); });                              \
  }
ATOMICS(device)
ATOMICS(threadgroup)
#undef FETCH
#undef ATOMICS

}  // namespace metal

using atomic_int = metal::atomic<int>;
using atomic_uint = metal::atomic<uint>;
using atomic_float = metal::atomic<float>;
