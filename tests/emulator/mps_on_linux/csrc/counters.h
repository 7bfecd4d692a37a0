// What tests assert on.
#pragma once

#include <string>

namespace emulator {

enum class Event { command_block, commit, synchronisation, library };

void count(Event event);
void count_dispatch(const std::string& kernel);
void count_fallback(const std::string& op);
void count_stable_call(const std::string& op);
void reset_counters();
std::string counters_as_json();

}  // namespace emulator
