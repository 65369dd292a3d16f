// The choice of the instruction set, made once per process.

#include "tile.h"

#include <ATen/Version.h>

#include <string>

namespace contrastive_ops {
namespace {

template <typename T>
const TileKernels<T>& choose(
    [[maybe_unused]] const TileKernels<T>* avx512,
    [[maybe_unused]] const TileKernels<T>* avx2,
    const TileKernels<T>* base) {
#ifdef CONTRASTIVE_OPS_X86
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") {
    return *avx512;
  }
  if (capability == "AVX2") {
    return *avx2;
  }
#endif
  return *base;
}

}  // namespace

#ifdef CONTRASTIVE_OPS_X86
#define CONTRASTIVE_OPS_VARIANTS(kernels) &AVX512::kernels, &AVX2::kernels, &DEFAULT::kernels
#else
#define CONTRASTIVE_OPS_VARIANTS(kernels) nullptr, nullptr, &DEFAULT::kernels
#endif

template <>
const TileKernels<float>& tile_kernels() {
  static const TileKernels<float>& kernels = choose<float>(CONTRASTIVE_OPS_VARIANTS(float_kernels));
  return kernels;
}

template <>
const TileKernels<double>& tile_kernels() {
  static const TileKernels<double>& kernels = choose<double>(CONTRASTIVE_OPS_VARIANTS(double_kernels));
  return kernels;
}

}  // namespace contrastive_ops
