#include "configuration.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <iterator>
#include <map>
#include <mutex>
#include <stdexcept>
#include <type_traits>

namespace torch_fused_lora {
namespace {

Overrides everywhere = {};
std::mutex mutex;
std::map<Layer, Overrides> tuned;
std::atomic<bool> any_tuned = false;  // read without the mutex
thread_local const Overrides* of_layer = nullptr;

void expect(bool holds, const std::string& what, const std::string& expected) {
  if (!holds) throw std::invalid_argument(what + ": expected " + expected);
}

/// "1, 2, 4"
std::string list(const uint32_t (&numbers)[5]) {
  std::string text;
  for (const auto* one = numbers; one != std::find(numbers, std::end(numbers), 0u); ++one) {
    text += (one == numbers ? "" : ", ") + std::to_string(*one);
  }
  return text;
}

/// Of a field that allows any number as well, only those that are tuned, if `listed`.
template <typename Configuration>
void set_field(
    Configuration& configuration, const std::string& entry, const std::string& name, uint64_t value, bool listed) {
  std::string names;
  for (const auto& field : Configuration::fields) {
    if (!field.follows) names += (names.empty() ? "" : ", ") + std::string(field.name);
    if (field.name != name) continue;
    expect(!field.follows, entry, "a field that is chosen; " + name + " follows from the problem");
    const bool any = field.allowed[0] == 0 && !listed;
    const auto& allowed = field.allowed[0] == 0 ? kTried : field.allowed;
    const bool fits =
        any ? value <= UINT32_MAX : std::find(std::begin(allowed), std::end(allowed), value) != std::end(allowed);
    expect(value >= 1 && fits, entry, any ? "a whole number from 1 on" : "one of " + list(allowed));
    configuration.*field.member = static_cast<uint32_t>(value);
    return;
  }
  expect(false, entry, "a field of that kernel: " + names);
}

/// 0 for what is no whole number of at most ten digits.
uint64_t number(const std::string& text) {
  const bool digits = !text.empty() && text.size() <= 10 && text.find_first_not_of("0123456789") == std::string::npos;
  return digits ? std::stoull(text) : 0;
}

Overrides parse(const std::string& text, bool listed) {
  Overrides found = {};
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string entry = text.substr(begin, end - begin);
    begin = end + 1;
    const size_t dot = entry.find('.'), equals = entry.find('=');
    expect(dot < equals && equals < entry.size(), entry, "kernel.field=number, with a comma between two of them");
    const std::string kernel = entry.substr(0, dot), field = entry.substr(dot + 1, equals - dot - 1);
    std::string kernels;
    const bool known = Overrides::any([&](const char* name, auto member) {
      kernels += (kernels.empty() ? "" : ", ") + std::string(name);
      if (name != kernel) return false;
      set_field(found.*member, entry, field, number(entry.substr(equals + 1)), listed);
      return true;
    });
    expect(known, entry, "a kernel of " + kernels);
  }
  return found;
}

Layer key(Layer layer) {
  layer.M = std::bit_ceil(layer.M);
  return layer;
}

}  // namespace

void set_overrides(const std::string& text) {
  try {
    everywhere = parse(text, false);
  } catch (const std::invalid_argument& refusal) {
    throw std::invalid_argument(std::string("TORCH_FUSED_LORA_PLAN: ") + refusal.what());
  }
}

std::string candidates() {
  std::string text;
  Overrides::any([&](const char* name, auto member) {
    std::string of_kernel;
    for (const auto& field : std::remove_reference_t<decltype(Overrides().*member)>::fields) {
      if (field.follows) continue;
      of_kernel += std::string(of_kernel.empty() ? "\"" : ", \"") + field.name + "\": [" +
          list(field.allowed[0] == 0 ? kTried : field.allowed) + "]";
    }
    text += std::string(text.empty() ? "\"" : ", \"") + name + "\": {" + of_kernel + "}";
    return false;
  });
  return "{" + text + "}";
}

void tune(const Layer& layer, const std::string& text) {
  const Overrides found = parse(text, true);
  std::lock_guard<std::mutex> lock(mutex);
  tuned.erase(key(layer));
  if (!text.empty()) tuned.emplace(key(layer), found);
  any_tuned = !tuned.empty();
}

Tuned::Tuned(const Layer& layer, bool ignored) : outer_(of_layer) {
  if (ignored || !any_tuned) return;
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = tuned.find(key(layer));
  if (found == tuned.end()) return;
  own_ = found->second;
  of_layer = &*own_;
}

Tuned::~Tuned() { of_layer = outer_; }

const Overrides& overrides() { return of_layer != nullptr ? *of_layer : everywhere; }

}  // namespace torch_fused_lora
