// Tells PyTorch that there is an mps device: its allocator, its guard and its hooks.
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "generator.h"
#include "memory.h"
#include "queue.h"

namespace {

using emulator::queue;

const c10::Device device(c10::kMPS, 0);
const c10::Stream stream(c10::Stream::DEFAULT, device);

// One stream, in order: an event that was recorded has happened once the queue is drained.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::kMPS;

  explicit Guard(c10::DeviceType = static_type) {}
  c10::DeviceType type() const override { return static_type; }
  c10::Device exchangeDevice(c10::Device) const override { return device; }
  c10::Device getDevice() const override { return device; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream; }
  c10::Stream getDefaultStream(c10::Device) const override { return stream; }
  c10::Stream getNewStream(c10::Device, int) const override { return stream; }
  c10::Stream exchangeStream(c10::Stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { queue().synchronise(); }
  void synchronizeStream(const c10::Stream&) const override { queue().synchronise(); }
  void synchronizeDevice(c10::DeviceIndex) const override { queue().synchronise(); }
};

}  // namespace

namespace at {

C10_REGISTER_GUARD_IMPL(MPS, Guard)

struct MPSHooks final : MPSHooksInterface {
  void init() const override {}
  bool hasMPS() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isOnMacOSorNewer(unsigned major, unsigned) const override { return major <= 15; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  Device getDeviceFromPtr(void*) const override { return {kMPS, 0}; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return emulator::default_generator(); }
  Generator getNewGenerator(DeviceIndex) const override { return emulator::new_generator(); }
  Allocator* getMPSDeviceAllocator() const override { return emulator::device_allocator(); }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(kCPU); }
  void deviceSynchronize() const override { queue().synchronise(); }
  void commitStream() const override { queue().submit(); }
  void emptyCache() const override { emulator::release_cached_memory(); }
  size_t getCurrentAllocatedMemory() const override { return emulator::memory_use().live_bytes; }
  size_t getDriverAllocatedMemory() const override {
    const auto use = emulator::memory_use();
    return use.live_bytes + use.cached_bytes;
  }
  size_t getRecommendedMaxMemory() const override { return size_t{16} << 30; }
  size_t getMaxBufferLength() const override { return size_t{8} << 30; }
  void setMemoryFraction(double) const override {}
};

C10_REGISTER_CLASS(MPSHooksRegistry, MPSHooks, MPSHooks)

namespace {
const bool allocator_is_set = (c10::SetAllocator(c10::kMPS, emulator::device_allocator()), true);
}

}  // namespace at
