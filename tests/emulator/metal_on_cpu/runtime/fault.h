// Turns the faults of a kernel into findings while it lives.
#pragma once

#include <csignal>

class FaultHandler {
 public:
  FaultHandler();
  ~FaultHandler();

 private:
  stack_t previous_stack_;
  alignas(16) char memory_[64 * 1024];
};
