// Every other operator: enqueued, and run by the CPU's kernel on the device's memory once its turn comes.
//
// Results are allocated when it is enqueued; their shapes come from torch's own shape functions (the meta device).
// Where an operator has none, or its result is a value or has a shape that depends on values, the host waits for it.
#pragma once

#include <dlfcn.h>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/histc.h>
#include <torch/library.h>

#include "generator.h"
#include "shapes.h"

namespace sim {

// Operators that waited, and how often: those that do on any device, and those that torch has no shapes for.
inline std::map<std::string, int64_t>& waited() {
  static auto* held = new std::map<std::string, int64_t>;
  return *held;
}

// What an operator returns, one for each of its results.
struct Result {
  enum Kind { kFresh, kFreshList, kArgument, kValue } kind;
  size_t argument = 0;
};

inline std::vector<Result> results_of(const c10::FunctionSchema& schema) {
  std::vector<Result> results;
  for (const auto& result : schema.returns()) {
    if (const auto* alias = result.alias_info()) {
      TORCH_CHECK(alias->isWrite(), "the simulated device has no view operator ", schema.operator_name());
      size_t argument = 0;
      const auto is_same = [&](const c10::Argument& one) {
        return one.alias_info() != nullptr && one.alias_info()->beforeSets() == alias->beforeSets();
      };
      while (!is_same(schema.arguments().at(argument))) ++argument;
      results.push_back({Result::kArgument, argument});
    } else if (result.type()->kind() == c10::TypeKind::TensorType) {
      results.push_back({Result::kFresh});
    } else if (*result.type() == *c10::ListType::ofTensors()) {
      results.push_back({Result::kFreshList});
    } else {
      results.push_back({Result::kValue});
    }
  }
  return results;
}

inline at::Tensor operand_of(const at::Tensor& tensor) {
  if (!tensor.defined() || is_ours(tensor)) return reached(tensor);
  TORCH_CHECK(tensor.is_cpu(), "an operand is on ", tensor.device());
  auto held = tensor.clone();  // the launch takes it along
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) held.unsafeGetTensorImpl()->set_wrapped_number(true);
  return held;
}

inline bool is_random(const c10::OperatorHandle& op) {
  if (op.hasTag(at::Tag::nondeterministic_seeded)) return true;
  for (const auto& argument : op.schema().arguments()) {
    if (argument.name() == "generator") return true;
  }
  return false;
}

// The interpreter, for as long as this is: no other thread of Python's sees what is done meanwhile.
class Interpreter {
 public:
  Interpreter() : state_(ensure()()) {}
  ~Interpreter() { release()(state_); }
  Interpreter(const Interpreter&) = delete;
  Interpreter& operator=(const Interpreter&) = delete;

 private:
  using Ensure = int (*)();
  using Release = void (*)(int);
  static Ensure ensure() { return reinterpret_cast<Ensure>(dlsym(RTLD_DEFAULT, "PyGILState_Ensure")); }
  static Release release() { return reinterpret_cast<Release>(dlsym(RTLD_DEFAULT, "PyGILState_Release")); }
  int state_;
};

// Run the CPU's kernel; its random numbers are those of ``seed``, whichever generator it takes them from. Most take the
// host's own, which another thread that waits for this work must not lend while the script seeds or reads it.
inline void run_on_cpu(const c10::OperatorHandle& op, Stack& stack, std::optional<uint64_t> seed) {
  const Below below;
  if (!seed) {
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
    return;
  }
  const Interpreter interpreter;
  const auto held = at::check_generator<at::CPUGeneratorImpl>(at::detail::getDefaultCPUGenerator())->clone();
  auto fresh = at::detail::createCPUGenerator(*seed);
  const auto restore = [](const c10::GeneratorImpl& state) {
    at::Generator generator = at::detail::getDefaultCPUGenerator();
    const std::lock_guard<std::mutex> lock(generator.mutex());
    generator.unsafeGetGeneratorImpl()->set_state(*state.get_state());
  };
  restore(*fresh.unsafeGetGeneratorImpl());
  for (auto& value : stack) {
    if (value.isGenerator()) value = fresh;
  }
  try {
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
  } catch (...) {
    restore(*held);
    throw;
  }
  restore(*held);
}

inline std::optional<uint64_t> seed_of(const c10::OperatorHandle& op, const Stack& given) {
  if (!is_random(op)) return std::nullopt;
  for (const auto& value : given) {
    if (value.isGenerator()) return check_sim(value.toGenerator())->draw();
  }
  return check_sim(default_generator())->draw();
}

inline Stack operands_of(const Stack& given) {
  const Below below;
  Stack stack;
  for (const auto& value : given) stack.push_back(mapped_value(value, operand_of, c10::Device(c10::kCPU)));
  return stack;
}

inline at::Tensor alike(const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  return empty_strided_of(tensor.sizes(), tensor.strides(), tensor.scalar_type());
}

inline void reshape(const at::Tensor& tensor, const at::Tensor& wanted) {
  if (tensor.sizes() == wanted.sizes()) return;
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(wanted.sizes(), wanted.strides());
  grow_for(tensor);
}

// For results that nothing tells but the values: run it, wait, and only then allocate.
inline Stack run_and_wait(const c10::OperatorHandle& op, const Stack& given, const std::vector<Result>& results) {
  const auto& schema = op.schema();
  const auto name = toString(schema.operator_name());
  auto operands = std::make_shared<Stack>(operands_of(given));
  for (size_t index = 0; index < given.size(); ++index) {
    if (schema.arguments()[index].is_out() && given[index].isTensor()) {
      const Below below;
      (*operands)[index] = at::empty({0}, at::TensorOptions().dtype(given[index].toTensor().dtype()));
    }
  }
  const Stack outputs = *operands;
  const auto seed = seed_of(op, given);
  {
    const Lock lock;
    ++waited()[name];
    Streams::get().enqueue(current_stream, [op, operands, seed] { run_on_cpu(op, *operands, seed); });
    Streams::get().synchronize(current_stream, kValue);
  }
  const auto brought = [](const at::Tensor& value) {
    auto fresh = alike(value);
    if (value.defined() && value.numel() > 0) enqueue_copy(reached(fresh), value, nullptr);
    return fresh;
  };
  for (size_t index = 0; index < given.size(); ++index) {
    if (!schema.arguments()[index].is_out() || !given[index].isTensor()) continue;
    const auto& value = outputs[index].toTensor();
    reshape(given[index].toTensor(), value);
    if (value.numel() > 0) enqueue_copy(reached(given[index].toTensor()), value, nullptr);
  }
  Stack out;
  for (size_t index = 0; index < results.size(); ++index) {
    const auto& value = (*operands)[index];
    if (results[index].kind == Result::kArgument) {
      out.push_back(given[results[index].argument]);
    } else {
      out.push_back(mapped_value(value, brought, kDevice0));
    }
  }
  return out;
}

inline void fallback(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size();
  const Stack given(stack->end() - static_cast<std::ptrdiff_t>(count), stack->end());
  torch::jit::drop(*stack, count);
  const auto results = results_of(schema);

  bool needs_shapes = false, has_value = false;
  for (const auto& result : results) {
    needs_shapes |= result.kind == Result::kFresh || result.kind == Result::kFreshList;
    has_value |= result.kind == Result::kValue;
  }
  for (const auto& argument : schema.arguments()) needs_shapes |= argument.is_out();
  std::optional<Stack> shapes;
  if (needs_shapes && !has_value) shapes = shapes_of(op, given);
  if (has_value || (needs_shapes && !shapes)) {
    for (auto& value : run_and_wait(op, given, results)) stack->push_back(std::move(value));
    return;
  }

  std::vector<at::Tensor> fresh;  // all that must be filled, results and lists in turn
  Stack out;
  for (size_t index = 0; index < results.size(); ++index) {
    const auto make = [&fresh](const at::Tensor& tensor) {
      fresh.push_back(alike(tensor));
      return fresh.back();
    };
    const auto& result = results[index];
    if (result.kind == Result::kArgument) {
      const auto& value = given[result.argument];
      const bool is_out = schema.arguments()[result.argument].is_out() && value.isTensor();
      if (is_out) reshape(value.toTensor(), (*shapes)[index].toTensor());
      out.push_back(value);
    } else {
      out.push_back(mapped_value((*shapes)[index], make, kDevice0));
    }
  }
  std::vector<at::Tensor> targets;
  for (const auto& tensor : fresh) targets.push_back(reached(tensor));
  const auto seed = seed_of(op, given);
  Streams::get().enqueue(current_stream, [op, results, targets, seed, operands = operands_of(given)] {
    Stack work = operands;
    run_on_cpu(op, work, seed);
    const Below below;
    size_t next = 0;
    const auto keep = [&](const at::Tensor& value) {
      const auto& target = targets.at(next++);
      if (!target.defined()) return;
      TORCH_CHECK(target.sizes() == value.sizes(), op.schema().operator_name(), " gave ", value.sizes());
      target.copy_(value);
    };
    for (size_t index = 0; index < results.size(); ++index) {
      if (results[index].kind == Result::kFresh) keep(work[index].toTensor());
      if (results[index].kind == Result::kFreshList) {
        for (const at::Tensor& value : work[index].toTensorVector()) keep(value);
      }
    }
  });
  for (auto& value : out) stack->push_back(std::move(value));
}

// A device has convolutions under names of their own; the CPU's are run.
inline void convolution(const c10::OperatorHandle&, Stack* stack) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", "");
  fallback(op, stack);
}

inline void convolution_backward(const c10::OperatorHandle& given, Stack* stack) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution_backward", "");
  const auto begin = stack->end() - static_cast<std::ptrdiff_t>(given.schema().arguments().size());
  const auto weight = begin[2].toTensor();
  const auto bias = std::vector<int64_t>{begin[6].toBool() ? weight.size(1) * begin[8].toInt() : weight.size(0)};
  stack->insert(begin + 3, c10::IValue(bias));
  fallback(op, stack);
}

// GPUs count integers too, which the CPU does not: as floats, exact below 2^24.
inline at::Tensor histc(const at::Tensor& self, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  const auto values = self.is_floating_point() ? self : self.to(at::kFloat);
  auto counts = at::empty({bins}, values.options());
  at::histc_out(counts, values, bins, low, high);
  return counts.to(self.scalar_type());
}

inline at::Scalar local_scalar(const at::Tensor& self) {
  const auto value = reached(self);
  Streams::get().synchronize(current_stream, kValue);
  const Below below;
  return at::_local_scalar_dense(value);
}

}  // namespace sim
