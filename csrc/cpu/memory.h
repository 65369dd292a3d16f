// Memory: of what is read where it lies, and for what is made and read again (packed operands, coefficients, kept
// dots).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdint>

namespace contrastive_ops {

// A tensor in the dtype T whose vectors are contiguous; they may lie apart from each other. A copy only where needed.
template <typename T>
at::Tensor with_dense_vectors(const at::Tensor& vectors) {
  const at::Tensor converted = vectors.to(c10::CppTypeToScalarType<T>::value);
  return converted.stride(-1) == 1 ? converted : converted.contiguous();
}

// at::empty, of large pages where the system gives them on request: the first write to a page is a fault, and every
// page that is read takes a place among the translated addresses. It is advice: what can't be had is left out.
inline at::Tensor empty_for_reuse(at::IntArrayRef sizes, c10::ScalarType dtype) {
  at::Tensor result = at::empty(sizes, dtype);
#ifdef MADV_HUGEPAGE
  constexpr size_t kLargePage = size_t(2) << 20;
  if (result.nbytes() >= 2 * kLargePage) {
    const auto begin = reinterpret_cast<uintptr_t>(result.mutable_data_ptr());
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t first = begin / page * page;
    madvise(reinterpret_cast<void*>(first), begin + result.nbytes() - first, MADV_HUGEPAGE);
  }
#endif
  return result;
}

}  // namespace contrastive_ops
