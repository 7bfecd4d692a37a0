#include "metal.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <memory>

#include "counters.h"
#include "encoder.h"
#include "queue.h"

namespace emulator {
namespace {

EmulatorHost host;
std::atomic<bool> enabled = true;
std::atomic<uint32_t> order = executor_forward;
thread_local std::string said, counters;

}  // namespace

ShaderLibrary* compile(const char* source) {
  TORCH_CHECK(host.compile, "mps emulator: no Metal compiler; call mps_on_linux.install()");
  count(Event::library);
  auto library = std::make_unique<ShaderLibrary>();
  TORCH_CHECK(host.compile(source, library.get()) == 0, "Failed to create metal library, error: ", said);
  return library.release();
}

void execute(const Kernel& kernel, ExecutorDispatch& dispatch) {
  if (!enabled) return;
  dispatch.launch = kernel.launch;
  dispatch.order = order;
  auto report = std::make_shared<ExecutorReport>();
  host.execute(&dispatch, report.get());
  if (report->complete && report->finding_count == 0) return;
  throw CommandError{[id = kernel.id, report] {
    host.describe(id, report.get());
    return said;
  }};
}

}  // namespace emulator

extern "C" {

void emulator_set_host(const EmulatorHost* host) { emulator::host = *host; }

void emulator_set_execution(bool enabled, uint32_t order) {
  emulator::enabled = enabled;
  emulator::order = order;
}

void emulator_share_one_stream() { emulator::share_one_stream(); }

void emulator_give_each_thread_a_stream(double meet_seconds) { emulator::give_each_thread_a_stream(meet_seconds); }

void emulator_add_kernel(
    emulator::ShaderLibrary* library,
    const char* name,
    void (*launch)(const ExecutorThread*),
    uint32_t max_threads,
    const ExecutorParameter* parameters,
    uint32_t parameter_count,
    uint64_t id) {
  emulator::Kernel kernel{name, launch, max_threads, {}, id, nullptr};
  for (uint32_t i = 0; i < parameter_count; ++i) kernel.parameters.emplace(parameters[i].index, parameters[i]);
  library->kernels.emplace(name, std::move(kernel));
}

void emulator_say(const char* text) { emulator::said = text; }

void emulator_reset_counters() { emulator::reset_counters(); }

const char* emulator_counters() {
  emulator::counters = emulator::counters_as_json();
  return emulator::counters.c_str();
}

}  // extern "C"
