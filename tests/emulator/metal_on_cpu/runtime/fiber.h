// Switching between stacks. x86-64 System V: a switch saves what a call must preserve, and the stack pointer.
#pragma once

#include <cstdint>

extern "C" void fiber_switch(void** save, void* to);
extern "C" [[noreturn]] void fiber_jump(void* to);  // leaves the running stack for good
extern "C" void fiber_entry();                      // calls the function that fiber_prepare left in rbx

// The stack pointer with which a switch to a fresh stack starts in `entry`, which must never return.
inline void* fiber_prepare(void* stack_top, void (*entry)()) {
  auto* frame = static_cast<uint64_t*>(stack_top) - 7;
  for (int i = 0; i < 6; ++i) frame[i] = 0;
  frame[4] = reinterpret_cast<uint64_t>(entry);        // rbx
  frame[6] = reinterpret_cast<uint64_t>(fiber_entry);  // return address; leaves the stack 16-byte aligned at the call
  return frame;
}
