// The choice of the instruction set and of the matrix unit, made once per process.

#include "tile.h"

#include <ATen/Version.h>

#ifdef CONTRASTIVE_OPS_MATRIX_UNIT
#include <ATen/cpu/Utils.h>
#include <cpuid.h>
#endif

#include <cstdlib>
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

bool matrix_unit_available() {
#ifdef CONTRASTIVE_OPS_MATRIX_UNIT
  static const bool result = [] {
    const char* wanted = std::getenv("CONTRASTIVE_OPS_MATRIX_UNIT");
    if ((wanted != nullptr && std::string(wanted) == "0") || at::get_cpu_capability() != "AVX512") {
      return false;
    }
    // compilers name these bits differently
    constexpr unsigned kAvx512Bf16 = 1u << 5;
    constexpr unsigned kAmx = (1u << 22) | (1u << 24);  // bfloat16 and tiles
    unsigned eax = 0;
    unsigned ebx = 0;
    unsigned ecx = 0;
    unsigned edx = 0;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & kAmx) != kAmx) {
      return false;
    }
    if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) == 0 || (eax & kAvx512Bf16) == 0) {
      return false;
    }
    return at::cpu::init_amx();  // the system must allow it to the process
  }();
  return result;
#else
  return false;
#endif
}

}  // namespace contrastive_ops
