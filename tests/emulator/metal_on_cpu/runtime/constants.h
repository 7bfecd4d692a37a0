// Program-scope constants of the loaded kernels, as their instrumentation registers them.
#pragma once

#include <cstddef>
#include <cstdint>

// As clang's address sanitizer lays it out.
struct Constant {
  uintptr_t begin;
  size_t size, padded_size;
  const char* name;
  const void* unused[4];
};

// The constants of one library, and the range of addresses that they and their red zones take.
struct Constants {
  const Constant* constants;
  size_t count;
  uintptr_t low, high;

  bool contains(uintptr_t address) const { return address - low < high - low; }
  const Constant* at(uintptr_t address) const {
    for (size_t i = 0; i < count; ++i) {
      if (address - constants[i].begin < constants[i].padded_size) return &constants[i];
    }
    return nullptr;
  }
};

// Those of the library that this function belongs to; none if it was not instrumented.
Constants constants_of(const void* function);
