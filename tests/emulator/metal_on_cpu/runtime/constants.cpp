#include "constants.h"

#include <algorithm>
#include <dlfcn.h>

namespace {

constexpr size_t max_libraries = 4096;  // loaded at one time; constants of more are not checked

Constants libraries[max_libraries];
size_t library_count = 0;

const void* base_of(const void* address) {
  Dl_info library = {};
  dladdr(address, &library);
  return library.dli_fbase;
}

}  // namespace

Constants constants_of(const void* function) {
  for (size_t i = 0; i < library_count; ++i) {
    if (base_of(libraries[i].constants) == base_of(function)) return libraries[i];
  }
  return {};
}

extern "C" {

void __asan_register_globals(const Constant* constants, size_t count) {
  if (library_count == max_libraries || count == 0) return;
  Constants library = {constants, count, ~uintptr_t{0}, 0};
  for (size_t i = 0; i < count; ++i) {
    library.low = std::min(library.low, constants[i].begin);
    library.high = std::max(library.high, constants[i].begin + constants[i].padded_size);
  }
  libraries[library_count++] = library;
}

void __asan_unregister_globals(const Constant* constants, size_t) {
  const auto is_it = [=](const Constants& library) { return library.constants == constants; };
  library_count = std::remove_if(libraries, libraries + library_count, is_it) - libraries;
}

}  // extern "C"
