// Tensors of the device: how they are made, resized, pointed at other memory, and copied to and from the host.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/InferSize.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/is_set_to_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>

#include "memory.h"

namespace sim {

inline const c10::Device kDevice0(c10::DeviceType::PrivateUse1, 0);

inline bool is_ours(const at::Tensor& tensor) { return tensor.defined() && tensor.is_privateuseone(); }

// No autograd, no autocast, no Python modes: as if the work ran on a thread of its own.
class Below {
  at::AutoDispatchBelowADInplaceOrView autograd_;
  c10::impl::ExcludeDispatchKeyGuard modes_{
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot,
                           c10::DispatchKey::PythonDispatcher, c10::DispatchKey::PreDispatch,
                           c10::DispatchKey::Functionalize}) |
      c10::autocast_dispatch_keyset};
};

class DeviceMemory final : public c10::DeviceAllocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    void* address = Memory::get().allocate(size, current_stream);
    return {address, address, &release, kDevice0};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override {
    void* target = Memory::get().reached(to);
    void* source = Memory::get().reached(from);
    Streams::get().enqueue(current_stream, [target, source, size] { std::memmove(target, source, size); });
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override { Memory::get().empty_cache(); }
  void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
    Memory::get().record(data.get(), static_cast<int>(stream.id()));
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    const auto& memory = Memory::get();
    auto& allocated = stats.allocated_bytes[0];
    allocated.current = static_cast<int64_t>(memory.allocated);
    allocated.peak = static_cast<int64_t>(memory.allocated_peak);
    auto& reserved = stats.reserved_bytes[0];
    reserved.current = static_cast<int64_t>(memory.reserved);
    reserved.peak = static_cast<int64_t>(memory.reserved_peak);
    auto& requested = stats.requested_bytes[0];
    requested.current = static_cast<int64_t>(memory.requested);
    requested.peak = static_cast<int64_t>(memory.requested_peak);
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override {
    auto& memory = Memory::get();
    memory.allocated_peak = memory.allocated;
    memory.reserved_peak = memory.reserved;
    memory.requested_peak = memory.requested;
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    const auto& memory = Memory::get();
    return {memory.limit - std::min(memory.limit, memory.reserved), memory.limit};
  }

 private:
  static void release(void* address) { Memory::get().free(address); }
};

class PinnedMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    void* address = Pinned::get().allocate(size);
    return {address, address, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memmove(to, from, size); }

 private:
  static void release(void* address) { Pinned::get().free(address); }
};

inline DeviceMemory& device_memory() {
  static auto* held = new DeviceMemory;
  return *held;
}

inline PinnedMemory& pinned_memory() {
  static auto* held = new PinnedMemory;
  return *held;
}

// The same memory as a tensor of the CPU, which kernels use. It keeps nothing alive, as a kernel's pointers do not.
inline at::Tensor reached(const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  auto* storage = static_cast<char*>(Memory::get().reached(tensor.storage().data()));
  const auto offset = static_cast<size_t>(tensor.storage_offset()) * tensor.itemsize();
  void* data = storage == nullptr ? nullptr : storage + offset;
  return at::from_blob(data, tensor.sizes(), tensor.strides(), at::TensorOptions().dtype(tensor.dtype()));
}

inline at::Tensor empty_strided_of(at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType dtype) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::Tensor(at::detail::empty_strided_generic(size, stride, &device_memory(), keys, dtype));
}

inline at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                        std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::Tensor(at::detail::empty_generic(size, &device_memory(), keys, c10::dtype_or_default(dtype), format));
}

inline at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                                std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return empty_strided_of(size, stride, c10::dtype_or_default(dtype));
}

inline void resize_storage(c10::StorageImpl* storage, size_t size) {
  c10::DataPtr data = device_memory().allocate(size);
  const size_t kept = std::min(size, storage->nbytes());
  if (kept > 0) device_memory().copy_data(data.get(), storage->data(), kept);
  storage->set_data_ptr_noswap(std::move(data));  // the old memory is freed behind the copy, in the stream's order
  storage->set_nbytes(size);
}

inline void grow_for(const at::Tensor& tensor) {
  const size_t bytes = at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.itemsize(),
                                                        static_cast<size_t>(tensor.storage_offset()));
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  if (tensor.numel() > 0 && bytes > storage->nbytes()) resize_storage(storage, bytes);
}

inline const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  if (self.sizes() == size && !format) return self;
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  if (format) self.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  grow_for(self);
  return self;
}

inline at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                               at::IntArrayRef stride) {
  TORCH_CHECK(source.device() == self.device(), "set_: the storage is on ", source.device());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset);
  if (stride.data() == nullptr || stride.size() != size.size()) {
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride);
  }
  grow_for(self);
  return self;
}

inline at::Tensor& set_source(at::Tensor& self, at::Storage source) {
  const auto size = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage(self, std::move(source), 0, {size}, {});
}

inline at::Tensor& set_nothing(at::Tensor& self) {
  c10::Storage none(c10::Storage::use_byte_size_t(), 0, device_memory().allocate(0), &device_memory(), true);
  return set_storage(self, std::move(none), 0, {0}, {});
}

// Whether a copy engine can go between the two by itself; else the host's side is packed or cast by the host.
inline bool is_plain_copy(const at::Tensor& to, const at::Tensor& from) {
  return to.dtype() == from.dtype() && to.sizes() == from.sizes() && to.strides() == from.strides() &&
         to.is_non_overlapping_and_dense();
}

inline void enqueue_copy(const at::Tensor& to, const at::Tensor& from, const void* pages) {
  if (pages != nullptr) Pinned::get().begin_use(pages);
  Streams::get().enqueue(current_stream, [to, from, pages] {
    {
      const Below below;
      to.copy_(from);
    }
    if (pages != nullptr) Pinned::get().end_use(pages);
  });
}

inline void to_device(const at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  const void* pages = source.storage().data();
  if (is_plain_copy(self, source) && Pinned::get().is_pinned(pages)) {
    enqueue_copy(reached(self), reached(source), pages);  // read when the copy runs, wherever that is
  } else {  // the driver takes pageable memory before it returns
    const Below below;
    enqueue_copy(reached(self), reached(source).clone(at::MemoryFormat::Preserve), nullptr);
  }
  if (!non_blocking) Streams::get().synchronize(current_stream, kCopy);
}

inline void to_host(const at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  const void* pages = self.storage().data();
  if (non_blocking && is_plain_copy(self, source) && Pinned::get().is_pinned(pages)) {
    enqueue_copy(reached(self), reached(source), pages);
    return;
  }
  enqueue_copy(reached(self), reached(source), nullptr);  // into pageable memory no copy returns before it is done
  Streams::get().synchronize(current_stream, kCopy);
}

inline at::Tensor& copy_(at::Tensor& self, const at::Tensor& given, bool non_blocking) {
  if (self.is_same(given)) return self;
  TORCH_CHECK(self.device().is_cpu() || is_ours(self), "copies go between this device and the CPU");
  TORCH_CHECK(given.device().is_cpu() || is_ours(given), "copies go between this device and the CPU");
  const at::Tensor source = *at::expand_size(given, self.sizes());
  if (self.numel() == 0) return self;
  if (is_ours(self) && is_ours(source)) {
    enqueue_copy(reached(self), reached(source), nullptr);
  } else if (is_ours(self)) {
    to_device(self, source, non_blocking);
  } else {
    to_host(self, source, non_blocking);
  }
  return self;
}

inline at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
  at::Tensor held = to;
  return copy_(held, self, non_blocking);
}

inline at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  at::Tensor held = to;
  held.resize_(self.sizes());
  return copy_(held, self, false);
}

inline void record_stream(at::Tensor& self, c10::Stream stream) {
  Memory::get().record(self.storage().data(), static_cast<int>(stream.id()));
}

// ``self.data = value`` may go across devices, as it may with CUDA, ROCm and XPU.
inline bool has_compatible_type(const at::Tensor& self, const at::Tensor& from) {
  const auto is_dense = [](const at::Tensor& one) {
    return one.layout() == at::kStrided && (is_ours(one) || one.is_cpu());
  };
  return is_dense(self) && is_dense(from);
}

// Page-locked memory of the host under an address that the device has for it.
inline at::Tensor mapped(const at::Tensor& host) {
  TORCH_CHECK(Pinned::get().is_pinned(host.storage().data()), "only page-locked memory can be mapped");
  auto held = host.storage();
  c10::DataPtr data(held.mutable_data(), new c10::Storage(held),
                    [](void* context) { delete static_cast<c10::Storage*>(context); }, kDevice0);
  c10::Storage storage(c10::Storage::use_byte_size_t(), held.nbytes(), std::move(data), nullptr, false);
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, host.dtype());
  tensor.unsafeGetTensorImpl()->set_storage_offset(host.storage_offset());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides());
  return tensor;
}

// What lies there now, whatever is still to run.
inline at::Tensor peek(const at::Tensor& tensor) {
  const Below below;
  return reached(tensor).clone();
}

}  // namespace sim
