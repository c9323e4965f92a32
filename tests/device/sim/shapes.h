// Shapes of results, by torch's own functions, asked once for operands that are alike: many are written in Python.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <unordered_map>

#include "tensors.h"

namespace sim {

using c10::IValue;
using torch::jit::Stack;

// Replace each tensor and device among arguments.
template <typename OfTensor>
IValue mapped_value(const IValue& value, const OfTensor& of_tensor, c10::Device device) {
  if (value.isTensor()) return of_tensor(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& one : value.toTensorVector()) list.push_back(of_tensor(one));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& one : value.toOptionalTensorVector()) {
      list.push_back(one ? std::optional<at::Tensor>(of_tensor(*one)) : std::nullopt);
    }
    return list;
  }
  if (value.isDevice()) return value.toDevice().is_privateuseone() ? IValue(device) : value;
  return value;
}

inline at::Tensor shape_of(const at::Tensor& tensor) {
  if (!tensor.defined() || (tensor.is_cpu() && tensor.dim() == 0)) return tensor;
  return at::Tensor(at::detail::empty_strided_meta(tensor.sizes(), tensor.strides(), tensor.scalar_type()));
}

template <typename Number>
void append(std::string& key, const Number& number) {
  key.append(reinterpret_cast<const char*>(&number), sizeof(number));
}

inline void append_tensor(std::string& key, const at::Tensor& tensor) {
  if (!tensor.defined()) {
    key += 'u';
    return;
  }
  key += tensor.is_cpu() ? 'c' : 't';
  key += tensor.unsafeGetTensorImpl()->is_wrapped_number() ? 'w' : ' ';
  append(key, tensor.scalar_type());
  append(key, tensor.dim());
  for (const int64_t size : tensor.sizes()) append(key, size);
  for (const int64_t stride : tensor.strides()) append(key, stride);
}

// Add to ``key`` all of an argument that shapes may depend on; false where that is not known.
inline bool append_value(std::string& key, const IValue& value) {
  if (value.isTensor()) {
    append_tensor(key, value.toTensor());
  } else if (value.isList()) {
    key += 'l';
    append(key, value.toListRef().size());
    for (const IValue& one : value.toListRef()) {
      if (!append_value(key, one)) return false;
    }
  } else if (value.isInt()) {
    key += 'i';
    append(key, value.toInt());
  } else if (value.isDouble()) {
    key += 'd';
    append(key, value.toDouble());
  } else if (value.isBool()) {
    key += value.toBool() ? 'T' : 'F';
  } else if (value.isString()) {
    key += 's' + value.toStringRef() + '\0';
  } else if (value.isNone() || value.isGenerator() || value.isDevice()) {
    key += 'n';
  } else {
    return false;
  }
  return true;
}

// Means and deviations are float32 on the meta device; the CPU's backward wants them as its forward gives them: in the
// input's dtype, unless that is lower than the weight's.
inline void statistics_as_on_the_cpu(const c10::OperatorHandle& op, const Stack& given, Stack& results) {
  const auto& name = op.operator_name().name;
  if (name != "aten::native_layer_norm" && name != "aten::native_group_norm") return;
  const auto& weight = given[name == "aten::native_layer_norm" ? 2 : 1];
  const auto dtype = given[0].toTensor().scalar_type();
  const bool is_mixed = weight.isTensor() && weight.toTensor().defined() && weight.toTensor().scalar_type() != dtype;
  for (const size_t index : {1, 2}) {
    const auto& held = results[index].toTensor();
    const auto wanted = is_mixed ? at::kFloat : dtype;
    results[index] = at::Tensor(at::detail::empty_strided_meta(held.sizes(), held.strides(), wanted));
  }
}

inline std::optional<Stack> ask_shapes(const c10::OperatorHandle& op, const Stack& given) {
  Stack stack;
  for (const auto& value : given) {
    stack.push_back(value.isGenerator() ? IValue() : mapped_value(value, shape_of, c10::Device(c10::kMeta)));
  }
  try {
    const Below below;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), &stack);
  } catch (const std::exception&) {
    return std::nullopt;
  }
  statistics_as_on_the_cpu(op, given, stack);
  return stack;
}

// Return what an operator would return of tensors without memory, or nothing where that depends on values.
inline std::optional<Stack> shapes_of(const c10::OperatorHandle& op, const Stack& given) {
  static auto* known = new std::unordered_map<std::string, std::optional<Stack>>;
  std::string key = toString(op.operator_name()) + '\0';
  append(key, c10::get_default_dtype_as_scalartype());
  for (const auto& value : given) {
    if (!append_value(key, value)) return ask_shapes(op, given);
  }
  {
    const Lock lock;
    const auto found = known->find(key);
    if (found != known->end()) return found->second;
  }
  auto shapes = ask_shapes(op, given);  // without the lock: Python may be asked
  const Lock lock;
  return known->emplace(std::move(key), std::move(shapes)).first->second;
}

}  // namespace sim
