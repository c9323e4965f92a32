// A simulated accelerator, as torch sees it: guard, hooks, operators, and a few functions for tests.
#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include "kernels.h"

namespace sim {
namespace {

struct Event {
  MarkPtr mark;
};

int id_of(const c10::Stream& stream) { return static_cast<int>(stream.id()); }

c10::Stream stream_of(int id) { return c10::Stream(c10::Stream::UNSAFE, kDevice0, id); }

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::PrivateUse1; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice0; }
  c10::Device getDevice() const override { return kDevice0; }
  void setDevice(c10::Device device) const override { TORCH_CHECK(device.index() <= 0, "there is one device"); }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  // Always: autograd counts devices once in a process, at its first backward, and starts a thread for each.
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Stream getStream(c10::Device) const override { return stream_of(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream_of(kCompute); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream_of(Streams::get().create()); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream_of(Streams::get().create()); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return stream_of(std::exchange(current_stream, id_of(stream)));
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override {
    return reinterpret_cast<void*>(static_cast<intptr_t>(id_of(stream)));
  }
  bool queryStream(const c10::Stream& stream) const override { return Streams::get().is_idle(id_of(stream)); }
  void synchronizeStream(const c10::Stream& stream) const override {
    Streams::get().synchronize(id_of(stream), kStream);
  }
  void synchronizeDevice(const c10::DeviceIndex) const override { Streams::get().synchronize(); }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    static_cast<Event*>(*event)->mark = Streams::get().record(id_of(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr) Streams::get().wait(id_of(stream), static_cast<Event*>(event)->mark);
  }
  bool queryEvent(void* event) const override {
    const Lock lock;
    return event == nullptr || static_cast<Event*>(event)->mark->done;
  }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) Streams::get().synchronize(static_cast<Event*>(event)->mark);
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  double elapsedTime(void* from, void* to, const c10::DeviceIndex) const override {
    const Lock lock;
    const auto& begin = static_cast<Event*>(from)->mark;
    const auto& end = static_cast<Event*>(to)->mark;
    TORCH_CHECK(begin->done && end->done, "both events must have come");
    return end->at_ms - begin->at_ms;
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    Memory::get().record(data.get(), id_of(stream));
  }
};

struct Hooks final : public at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return Streams::get().enabled; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return Streams::get().enabled; }
  c10::DeviceIndex deviceCount() const override { return Streams::get().enabled ? 1 : 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* data) const override { return Pinned::get().is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory(); }
  at::Device getDeviceFromPtr(void* data) const override {
    return Memory::get().holds(data) ? kDevice0 : at::Device(at::kCPU);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Random>(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    resize_storage(storage.unsafeGetStorageImpl(), size);
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// NOLINTNEXTLINE: before anything asks for it
const bool registered = [] {
  c10::SetAllocator(c10::DeviceType::PrivateUse1, &device_memory());
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

std::string& last_error() {
  thread_local std::string held;
  return held;
}

template <typename Call>
int tried(const Call& call) {
  try {
    call();
    return 0;
  } catch (const std::exception& error) {
    last_error() = error.what();
    return 1;
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Storage", TORCH_FN(set_source));
  m.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  m.impl("set_", TORCH_FN(set_nothing));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("view_as_real", TORCH_FN(at::native::view_as_real));
  m.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
  m.impl("is_set_to", TORCH_FN(at::native::is_set_to));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("_local_scalar_dense", TORCH_FN(local_scalar));
  m.impl("record_stream", TORCH_FN(record_stream));
  m.impl("_has_compatible_shallow_copy_type", TORCH_FN(has_compatible_type));
  m.impl("histc", TORCH_FN(histc));
  m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
  m.impl("convolution_backward_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution_backward>());
  // Those for which the CPU has a kernel, and every other device a decomposition with other bits.
  for (const char* name :
       {"_stack", "_stack.out", "addr", "addr.out", "all.dims", "all.dims_out", "any.dims", "any.dims_out",
        "linalg__powsum", "mish_backward", "native_channel_shuffle", "native_group_norm", "native_layer_norm",
        "silu_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
}

// As where it is a composite: before a subclass is asked about it.
TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) {
  m.impl("_has_compatible_shallow_copy_type", TORCH_FN(has_compatible_type));
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

// What every GPU's autocast computes in less precision, and what in float32.
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FLOAT32)
#undef LOWER
#undef FLOAT32
}

TORCH_LIBRARY(sim, m) {
  m.def("mapped(Tensor host) -> Tensor", &mapped);
  m.def("peek(Tensor self) -> Tensor", &peek);
  m.def("seed(int seed) -> ()",
        [](int64_t seed) { default_generator().get<Random>()->set_current_seed(static_cast<uint64_t>(seed)); });
  m.def("rng_state() -> Tensor", [] { return at::Tensor(default_generator().get<Random>()->get_state()); });
  m.def("set_rng_state(Tensor state) -> ()",
        [](const at::Tensor& state) { default_generator().get<Random>()->set_state(*state.unsafeGetTensorImpl()); });
}

}  // namespace sim

// What tests ask for, by ctypes.
extern "C" {
using namespace sim;
void sim_enable(int enabled) {
  at::globalContext().lazyInitDevice(c10::DeviceType::PrivateUse1);  // else no memory counts as pinned for it
  Streams::get().enabled = enabled != 0;
}
void sim_policy(int policy) {
  const Lock lock;
  Streams::get().policy = static_cast<Policy>(policy);
}
void sim_limit(int64_t bytes) { Memory::get().limit = static_cast<size_t>(bytes); }
int64_t sim_allocated() { return static_cast<int64_t>(Memory::get().allocated); }
int64_t sim_pending() { return Streams::get().pending(); }
int64_t sim_waits(int kind) { return Streams::get().waits.at(static_cast<size_t>(kind)); }
void sim_forget_waits() {
  const Lock lock;
  Streams::get().waits.fill(0);
  waited().clear();
}
const char* sim_waited() {
  thread_local std::string text;
  const Lock lock;
  text.clear();
  for (const auto& [name, count] : waited()) text += name + " " + std::to_string(count) + "\n";
  return text.c_str();
}
int sim_register(void* address, int64_t bytes) {
  return tried([&] { Pinned::get().add(address, static_cast<size_t>(bytes)); });
}
int sim_unregister(void* address) {
  return tried([&] { Pinned::get().remove(address); });
}
const char* sim_error() { return last_error().c_str(); }
}
