// The device's own generator: a seed and how often it was drawn from, as on a GPU.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/ops/empty.h>
#include <c10/core/GeneratorImpl.h>

#include "tensors.h"

namespace sim {

class Random final : public c10::GeneratorImpl {
 public:
  Random() : c10::GeneratorImpl(kDevice0, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}

  // The seed of one operator's random numbers.
  uint64_t draw() {
    const std::lock_guard<std::mutex> lock(mutex_);
    uint64_t mixed = seed_ + 0x9E3779B97F4A7C15ull * ++drawn_;  // splitmix64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9ull;
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBull;
    return mixed ^ (mixed >> 31);
  }

  void set_current_seed(uint64_t seed) override {
    seed_ = seed;
    drawn_ = 0;
  }
  void set_offset(uint64_t offset) override { drawn_ = offset; }
  uint64_t get_offset() const override { return drawn_; }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return seed_;
  }
  void set_state(const c10::TensorImpl& state) override {
    TORCH_CHECK(state.numel() == 16 && state.dtype() == caffe2::TypeMeta::Make<uint8_t>(), "a state has 16 bytes");
    const auto* words = static_cast<const uint64_t*>(state.data());
    seed_ = words[0];
    drawn_ = words[1];
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    auto state = at::detail::empty_cpu({16}, at::kByte);
    auto* words = static_cast<uint64_t*>(state.mutable_data_ptr());
    words[0] = seed_;
    words[1] = drawn_;
    return state.getIntrusivePtr();
  }
  static c10::DeviceType device_type() { return c10::DeviceType::PrivateUse1; }

 private:
  uint64_t seed_ = c10::default_rng_seed_val;
  uint64_t drawn_ = 0;
  Random* clone_impl() const override {
    auto* other = new Random;
    other->seed_ = seed_;
    other->drawn_ = drawn_;
    return other;
  }
};

inline const at::Generator& default_generator() {
  static auto* held = new at::Generator(at::make_generator<Random>());
  return *held;
}

inline Random* check_sim(const at::Generator& generator) {
  TORCH_CHECK(generator.device().is_privateuseone(), "a generator of ", generator.device(), " was given");
  return generator.get<Random>();
}

}  // namespace sim
