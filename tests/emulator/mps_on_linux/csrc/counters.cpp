#include "counters.h"

#include <array>
#include <cstddef>
#include <map>
#include <mutex>
#include <sstream>
#include <utility>

#include "memory.h"

namespace emulator {
namespace {

using ByName = std::map<std::string, size_t>;

std::mutex mutex;
std::array<size_t, 4> events;
ByName dispatches, fallbacks, stable_calls;

size_t of(Event event) { return events[static_cast<size_t>(event)]; }

std::ostream& operator<<(std::ostream& out, const ByName& counts) {
  const char* separator = "";
  out << '{';
  for (const auto& [name, number] : counts) out << std::exchange(separator, ", ") << '"' << name << "\": " << number;
  return out << '}';
}

}  // namespace

void count(Event event) {
  const std::lock_guard lock(mutex);
  ++events[static_cast<size_t>(event)];
}

void count_dispatch(const std::string& kernel) {
  const std::lock_guard lock(mutex);
  ++dispatches[kernel];
}

void count_fallback(const std::string& op) {
  const std::lock_guard lock(mutex);
  ++fallbacks[op];
}

void count_stable_call(const std::string& op) {
  const std::lock_guard lock(mutex);
  ++stable_calls[op];
}

void reset_counters() {
  const std::lock_guard lock(mutex);
  events = {};
  dispatches.clear();
  fallbacks.clear();
  stable_calls.clear();
  reset_memory_counts();
}

std::string counters_as_json() {
  const std::lock_guard lock(mutex);
  const MemoryUse memory = memory_use();
  std::ostringstream out;
  out << "{\"dispatches\": " << dispatches << ", \"fallbacks\": " << fallbacks << ", \"stable_calls\": " << stable_calls
      << ", \"command_blocks\": " << of(Event::command_block) << ", \"commits\": " << of(Event::commit)
      << ", \"synchronisations\": " << of(Event::synchronisation) << ", \"libraries\": " << of(Event::library)
      << ", \"allocations\": " << memory.allocations << ", \"live_buffers\": " << memory.live_buffers
      << ", \"live_bytes\": " << memory.live_bytes << ", \"peak_bytes\": " << memory.peak_bytes << "}";
  return out.str();
}

}  // namespace emulator
