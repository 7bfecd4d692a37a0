#include "generator.h"

#include <ATen/CPUGeneratorImpl.h>

#include "queue.h"

namespace emulator {
namespace {

// Queued commands draw when they run, so whoever looks at the state or sets it lets them run first.
class MPSGenerator final : public c10::GeneratorImpl {
 public:
  explicit MPSGenerator(at::Generator host)
      : GeneratorImpl(at::Device(at::kMPS, 0), at::DispatchKeySet(at::DispatchKey::MPS)), host_(std::move(host)) {}

  const at::Generator& host() const { return host_; }
  void set_current_seed(uint64_t seed) override { settled().set_current_seed(seed); }
  void set_offset(uint64_t offset) override { settled().set_offset(offset); }
  uint64_t get_offset() const override { return settled().get_offset(); }
  uint64_t current_seed() const override { return host_.current_seed(); }
  uint64_t seed() override { return settled().seed(); }
  void set_state(const c10::TensorImpl& state) override { settled().set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return settled().get_state(); }

 private:
  c10::GeneratorImpl& settled() const {
    queue().drain();
    return *host_.unsafeGetGeneratorImpl();
  }
  MPSGenerator* clone_impl() const override {
    queue().drain();
    return new MPSGenerator(host_.clone());
  }

  at::Generator host_;
};

}  // namespace

at::Generator new_generator() { return at::make_generator<MPSGenerator>(at::detail::createCPUGenerator()); }

const at::Generator& default_generator() {
  static const auto* generator = new at::Generator(new_generator());
  return *generator;
}

at::Generator host_generator(const at::Generator& generator) {
  TORCH_CHECK(
      generator.device().is_mps(), "Expected a 'mps' device type for generator but found '", generator.device().type(),
      "'");
  return static_cast<MPSGenerator*>(generator.unsafeGetGeneratorImpl())->host();
}

}  // namespace emulator
