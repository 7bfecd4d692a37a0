// Shader libraries, and what Python provides for them: the compiler and the executor of metal_on_cpu. The C functions
// at the end are called from Python.
#pragma once

#include <map>
#include <string>

#include "executor.h"

namespace emulator {

class Encoder;

struct Kernel {
  std::string name;
  void (*launch)(const ExecutorThread*);
  uint32_t max_threads;  // a threadgroup
  std::map<uint32_t, ExecutorParameter> parameters;  // by buffer index
  uint64_t id;  // Python's
  mutable Encoder* encoder;  // of any thread, that started it last
};

struct ShaderLibrary {
  std::map<std::string, Kernel> kernels;
};

// Lives as long as the process; throws with the compiler's text.
ShaderLibrary* compile(const char* source);

// Runs a dispatch; throws CommandError for what the executor finds.
void execute(const Kernel& kernel, ExecutorDispatch& dispatch);

}  // namespace emulator

extern "C" {

struct EmulatorHost {
  // Compiles source: calls emulator_add_kernel for each kernel, or emulator_say with an error and returns non-zero.
  int (*compile)(const char* source, emulator::ShaderLibrary* library);
  // Describes findings by emulator_say.
  void (*describe)(uint64_t kernel_id, const ExecutorReport* report);
  void (*execute)(const ExecutorDispatch* dispatch, ExecutorReport* report);
};

void emulator_set_host(const EmulatorHost* host);
void emulator_set_execution(bool enabled, uint32_t order);
// share_one_stream and give_each_thread_a_stream of encoder.h.
void emulator_share_one_stream();
void emulator_give_each_thread_a_stream(double meet_seconds);
void emulator_add_kernel(
    emulator::ShaderLibrary* library,
    const char* name,
    void (*launch)(const ExecutorThread*),
    uint32_t max_threads,
    const ExecutorParameter* parameters,
    uint32_t parameter_count,
    uint64_t id);
void emulator_say(const char* text);
void emulator_reset_counters();
const char* emulator_counters();  // JSON, valid until this thread's next call

}  // extern "C"
