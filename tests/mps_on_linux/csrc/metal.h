// Shader libraries, and what Python provides for them: the compiler and the executor of metal_on_cpu. The C functions at
// the end are called from Python.
#pragma once

#include <map>
#include <string>

#include "executor.h"

namespace bench {

class Encoder;

struct Kernel {
    std::string name;
    void (*launch)(const ExecutorThread*);
    uint32_t max_threads;                             // a threadgroup
    std::map<uint32_t, ExecutorParameter> parameters;  // by buffer index
    uint64_t id;                                      // Python's
    mutable Encoder* encoder;                         // of any thread, that started it last
};

struct ShaderLibrary {
    std::map<std::string, Kernel> kernels;
};

// Lives as long as the process; throws with the compiler's text.
ShaderLibrary* compile(const char* source);

// Runs a dispatch; throws CommandError for what the executor finds.
void execute(const Kernel& kernel, ExecutorDispatch& dispatch);

}  // namespace bench

extern "C" {

struct BenchHost {
    // Compiles source: calls bench_add_kernel for each kernel, or bench_say with an error and returns non-zero.
    int (*compile)(const char* source, bench::ShaderLibrary* library);
    // Describes findings by bench_say.
    void (*describe)(uint64_t kernel_id, const ExecutorReport* report);
    void (*execute)(const ExecutorDispatch* dispatch, ExecutorReport* report);
};

void bench_set_host(const BenchHost* host);
void bench_set_execution(bool enabled, uint32_t order);
// share_one_stream and give_each_thread_a_stream of encoder.h.
void bench_share_one_stream();
void bench_give_each_thread_a_stream(double meet_seconds);
void bench_add_kernel(bench::ShaderLibrary* library, const char* name, void (*launch)(const ExecutorThread*),
                      uint32_t max_threads, const ExecutorParameter* parameters, uint32_t parameter_count, uint64_t id);
void bench_say(const char* text);
void bench_reset_counters();
const char* bench_counters();  // JSON, valid until this thread's next call

}  // extern "C"
