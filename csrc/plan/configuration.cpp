#include "configuration.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>

namespace torch_fused_lora {
namespace {

Overrides current = {};

void expect(bool holds, const std::string& what, const std::string& expected) {
  if (!holds) throw std::invalid_argument("TORCH_FUSED_LORA_PLAN: " + what + ": expected " + expected);
}

template <typename Configuration>
void set_field(Configuration& configuration, const std::string& entry, const std::string& name, uint64_t value) {
  std::string names;
  for (const auto& field : Configuration::fields) {
    if (!field.follows) names += (names.empty() ? "" : ", ") + std::string(field.name);
    if (field.name != name) continue;
    expect(!field.follows, entry, "a field that is chosen; " + name + " follows from the problem");
    const auto* const end = std::find(std::begin(field.allowed), std::end(field.allowed), 0u);
    std::string allowed;
    for (const auto* one = field.allowed; one != end; ++one) {
      allowed += (one == field.allowed ? "" : ", ") + std::to_string(*one);
    }
    const bool any = end == field.allowed;
    expect(
        any ? value >= 1 && value <= UINT32_MAX : std::find(field.allowed, end, value) != end, entry,
        any ? "a whole number from 1 on" : "one of " + allowed);
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

}  // namespace

void set_overrides(const std::string& text) {
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
      set_field(found.*member, entry, field, number(entry.substr(equals + 1)));
      return true;
    });
    expect(known, entry, "a kernel of " + kernels);
  }
  current = found;
}

const Overrides& overrides() { return current; }

}  // namespace torch_fused_lora
