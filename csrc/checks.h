// Argument checks of the ops: an error names the argument, what was given and what is accepted.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "statistics.h"

namespace tokenrl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

template <int kCount>
int named(const char* const (&names)[kCount], const std::string& given, const char* argument) {
  const int found = find_name(names, given.c_str());
  if (found >= 0) return found;
  std::string accepted;
  for (const char* name : names) accepted += std::string(accepted.empty() ? "" : ", ") + name;
  STD_TORCH_CHECK(false, argument, ": got '", given, "', accepted: ", accepted, ".");
  return found;
}

bool is_through(const std::string& flow) {
  static constexpr const char* kFlows[] = {"local", "through"};
  return named(kFlows, flow, "flow") == 1;
}

// As Python spells it.
const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

void check(const Tensor& x, const char* name, ScalarType dtype, int64_t numel, const Tensor& like) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, ": got ", dtype_name(x.scalar_type()), ", expected ",
                  dtype_name(dtype), ".");
  STD_TORCH_CHECK(x.numel() == numel, name, ": got ", x.numel(), " elements, expected ", numel, ".");
  STD_TORCH_CHECK(x.is_contiguous(), name, ": got a strided tensor, expected a contiguous one.");
  STD_TORCH_CHECK(x.is_cuda() == like.is_cuda() && x.get_device_index() == like.get_device_index(), name,
                  ": got another device than that of the other tensors.");
}

template <class T>
const T* pointer(const Tensor& x) {
  return static_cast<const T*>(x.data_ptr());
}
template <class T>
T* output(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}
template <class T>
const T* checked(const Optional& x, const char* name, ScalarType dtype, int64_t numel, const Tensor& like) {
  if (!x) return nullptr;
  check(*x, name, dtype, numel, like);
  return pointer<T>(*x);
}

Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

Spans spans_of(const Optional& mask, const Tensor& cu_seqlens, const Optional& starts, int64_t num_tokens) {
  STD_TORCH_CHECK(cu_seqlens.numel() >= 1, "cu_seqlens: got no element, expected [S + 1].");
  check(cu_seqlens, "cu_seqlens", ScalarType::Long, cu_seqlens.numel(), cu_seqlens);
  return {num_tokens, cu_seqlens.numel() - 1, pointer<int64_t>(cu_seqlens),
          checked<bool>(mask, "mask", ScalarType::Bool, num_tokens, cu_seqlens),
          checked<bool>(starts, "starts", ScalarType::Bool, num_tokens, cu_seqlens)};
}

// f(T{}) for the precision of x: float or double.
template <class F>
auto by_precision(const Tensor& x, const char* name, F&& f) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, name, ": got ",
                  dtype_name(x.scalar_type()), ", expected float32 or float64.");
  return x.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

template <class T, size_t kCount>
void fill_params(Param<T> (&params)[kCount], size_t expected, const std::vector<double>& numbers,
                 const std::vector<Optional>& tensors, int64_t num_tokens, const Tensor& like) {
  STD_TORCH_CHECK(expected <= kCount && numbers.size() == expected && tensors.size() == expected, "params: got ",
                  numbers.size(), " numbers and ", tensors.size(), " tensors, expected ", expected, " of each.");
  for (size_t k = 0; k < expected; ++k)
    params[k] = {checked<T>(tensors[k], "param_tensors", like.scalar_type(), num_tokens, like),
                 static_cast<T>(numbers[k])};
}

template <class... Gate>
size_t num_params_of(std::tuple<Gate...>*, const std::string& gate) {
  int found = -1;
  ((Gate::name == gate ? void(found = Gate::num_params) : void()), ...);
  const char* const names[] = {Gate::name...};
  if (found < 0) named(names, gate, "gate");
  return static_cast<size_t>(found);
}

}  // namespace
}  // namespace tokenrl
