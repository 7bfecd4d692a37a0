// The longest chain of steps that wait for each other. Loads of device memory are in flight together until one of them
// is issued from the same place again, by the next pass of a loop, or until a barrier.
#pragma once

#include <cstddef>
#include <cstdint>

class Chain {
 public:
  void start_threadgroup();
  void load(uint32_t simdgroup, const void* pc);  // by a simdgroup's first lane, which speaks for all
  void collective(uint32_t simdgroup, bool is_matrix_multiply);
  void barrier();  // of the threadgroup, or its end

  uint64_t steps = 0;                        // with loads, of the running threadgroup
  uint64_t multiplies() const;               // of its simdgroup that has most
  uint64_t collectives() const;              // all others

 private:
  static constexpr size_t places = 64, simdgroups = 32;
  struct Place {
    const void* pc;
    uint32_t passes;
  };
  Place places_[simdgroups][places];
  uint32_t counts_[simdgroups];
  uint64_t multiplies_[simdgroups], collectives_[simdgroups];
};
