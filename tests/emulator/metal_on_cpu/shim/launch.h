// How the host calls a kernel: a launcher turns what the runtime knows of a thread into the kernel's arguments.
#pragma once

#include "../runtime/thread.h"

#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable
namespace metal {
namespace executor {

// A parameter that is a pointer or a reference into a buffer.
template <typename T> struct buffer_traits {
  static constexpr bool is_buffer = false;
};
template <typename T> struct buffer_traits<device T*> {
  static constexpr bool is_buffer = true;
  static constexpr uint space = __is_const(T) ? executor_device_const : executor_device;
  using pointee = T;
  using pointer = device T*;
};
template <typename T> struct buffer_traits<constant T*> {
  static constexpr bool is_buffer = true;
  static constexpr uint space = executor_constant;
  using pointee = T;
  using pointer = constant T*;
};
template <typename T> struct buffer_traits<device T&> : buffer_traits<device T*> {};
template <typename T> struct buffer_traits<constant T&> : buffer_traits<constant T*> {};

template <uint source, typename A> A argument(const ExecutorThread* state) {
  if constexpr (source < executor_first_id) {
    static_assert(buffer_traits<A>::is_buffer, "a buffer parameter is a device or constant pointer or reference");
    const auto pointer = (typename buffer_traits<A>::pointer)(uintptr_t)state->buffers[source];
    if constexpr (__is_pointer(A)) {
      return pointer;
    } else {
      return *pointer;
    }
  } else {
    constexpr uint slot = source - executor_first_id;
    constexpr int size = vector_traits<A>::size;
    static_assert(size == 1 || (size <= 3 && source < thread_index_in_threadgroup), "this attribute is a scalar");
    if constexpr (vector_traits<A>::is_vector) {
      A value;
      for (int i = 0; i < size; ++i) value[i] = state->ids[slot + i];
      return value;
    } else {
      return A(state->ids[slot]);
    }
  }
}

// Each source is a buffer index or an ExecutorId.
template <uint... sources, typename... A> void launch(void (*function)(A...), const ExecutorThread* state) {
  function(argument<sources, A>(state)...);
}

template <uint source, typename A> void describe(ExecutorParameter*& parameter) {
  if constexpr (source < executor_first_id) {
    using Buffer = buffer_traits<A>;
    *parameter++ = {source, Buffer::space, sizeof(typename Buffer::pointee), alignof(typename Buffer::pointee)};
  }
}

template <uint... sources, typename... A> void describe_all(void (*)(A...), ExecutorParameter* parameters) {
  (describe<sources, A>(parameters), ...);
}

}  // namespace executor
}  // namespace metal
#pragma OPENCL EXTENSION __cl_clang_function_pointers : disable
