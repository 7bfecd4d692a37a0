// Stands in front of PyTorch's torch_call_dispatcher, by which an extension calls ATen: counts the calls, and refuses
// matrix products that are wrong or slow on some Mac. PyTorch's own code and models call ATen in other ways, and may.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <iterator>
#include <string_view>

#include "counters.h"

namespace emulator {
namespace {

// The arguments of a product: the left matrix, the right one after it, and what is added, if there is such an argument.
struct Product {
  std::string_view name;
  int left, added;
  bool added_is_optional;
};

constexpr Product products[] = {
    {"aten::linear", 0, 2, true}, {"aten::matmul", 0, -1, false}, {"aten::mm", 0, -1, false},
    {"aten::addmm", 1, 0, false}, {"aten::bmm", 0, -1, false},    {"aten::baddbmm", 1, 0, false},
};
constexpr int64_t long_reduction = 32767;  // from here on some read past their operands

at::Tensor* tensor_at(StableIValue value) { return reinterpret_cast<at::Tensor*>(value); }

// The issues of pytorch/pytorch stand in csrc/mps/products.mm.
void check(const Product& product, const StableIValue* stack) {
  const at::Tensor &left = *tensor_at(stack[product.left]), &right = *tensor_at(stack[product.left + 1]);
  const auto refuse = [&](bool wrong, const char* what) {
    TORCH_CHECK(
        !wrong, "mps emulator: ", product.name, " of ", left.sizes(), " and ", right.sizes(), ": ", what,
        ", which is wrong or slow on some Mac");
  };
  refuse(left.dim() != 2 || right.dim() != 2, "an operand that has not two dimensions");
  refuse(left.numel() == 0 || right.numel() == 0, "an empty operand");
  refuse(left.size(1) >= long_reduction, "a reduction of 32,767 or more");
  refuse(left.size(0) == 1 && product.added >= 0 && stack[product.added], "a single row with a bias");
}

// The arguments of a call are the callee's, also of one that fails.
void release(const Product& product, StableIValue* stack) {
  delete tensor_at(stack[product.left]);
  delete tensor_at(stack[product.left + 1]);
  if (product.added < 0 || !stack[product.added]) return;
  auto* optional = product.added_is_optional ? reinterpret_cast<StableIValue*>(stack[product.added]) : nullptr;
  delete tensor_at(optional ? *optional : stack[product.added]);
  delete optional;
}

void check_or_release(std::string_view name, StableIValue* stack) {
  const auto is_named = [name](const Product& product) { return product.name == name; };
  const auto* product = std::find_if(std::begin(products), std::end(products), is_named);
  if (product == std::end(products)) return;
  try {
    check(*product, stack);
  } catch (...) {
    release(*product, stack);
    throw;
  }
}

}  // namespace
}  // namespace emulator

extern "C" AOTITorchError torch_call_dispatcher(
    const char* name, const char* overload, StableIValue* stack, uint64_t extension_build_version) {
  using Function = decltype(&torch_call_dispatcher);
  static const auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "torch_call_dispatcher"));
  emulator::count_stable_call(name);
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    emulator::check_or_release(name, stack);
    if (const auto status = real(name, overload, stack, extension_build_version)) return status;
  });
}
