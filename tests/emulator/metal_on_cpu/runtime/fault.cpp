// A fault of a kernel: an access to a guard page, a misaligned vector, a stack that overflowed. It becomes a finding,
// and the dispatch ends.
#include "fault.h"

#include <ucontext.h>

#include "fiber.h"
#include "scheduler.h"

namespace {

struct sigaction previous_segv, previous_bus, previous_fpe;

void on_fault(int signal, siginfo_t* info, void* context) {
  if (!running.thread) {  // not ours: let it happen again under the handler that was there before
    sigaction(SIGSEGV, &previous_segv, nullptr);
    sigaction(SIGBUS, &previous_bus, nullptr);
    sigaction(SIGFPE, &previous_fpe, nullptr);
    return;
  }
  auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  const bool guarded = signal == SIGSEGV && (running.device.contains(address) || running.threadgroup.contains(address));
  const auto* pc = reinterpret_cast<const uint8_t*>(registers[REG_RIP]) + 1;  // findings hold return addresses
  if (auto* finding = report_finding(guarded ? executor_out_of_bounds : executor_fault, pc)) {
    finding->offset = int64_t(address);
    if (const Region* region = guarded && running.device.contains(address) ? running.device.at(address) : nullptr) {
      finding->object = executor_buffer_object;
      finding->index = region->index;
      finding->offset = int64_t(address) - int64_t(reinterpret_cast<uintptr_t>(region->begin));
      finding->object_size = region->size;
      finding->store = (registers[REG_ERR] & 2) != 0;
    }
  }
  running.thread = nullptr;
  running.report->complete = 0;
  registers[REG_RDI] = greg_t(scheduler_stack_pointer);
  registers[REG_RIP] = greg_t(fiber_jump);
}

}  // namespace

FaultHandler::FaultHandler() {
  stack_t alternate = {.ss_sp = memory_, .ss_flags = 0, .ss_size = sizeof memory_};
  sigaltstack(&alternate, &previous_stack_);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &previous_segv);
  sigaction(SIGBUS, &action, &previous_bus);
  sigaction(SIGFPE, &action, &previous_fpe);
}

FaultHandler::~FaultHandler() {
  sigaction(SIGSEGV, &previous_segv, nullptr);
  sigaction(SIGBUS, &previous_bus, nullptr);
  sigaction(SIGFPE, &previous_fpe, nullptr);
  sigaltstack(&previous_stack_, nullptr);
}
