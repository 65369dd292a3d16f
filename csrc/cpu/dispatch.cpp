// The choice of the instruction set and of the unit for bfloat16, made once per process.

#include "tile.h"

#include <ATen/Version.h>
#include <c10/util/Exception.h>

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

#ifdef CONTRASTIVE_OPS_MATRIX_UNIT
namespace {

struct Registers {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
};

// What the processor says of itself, zeros for a leaf that it does not have.
Registers cpuid(unsigned leaf, unsigned part) {
  Registers result;
  __get_cpuid_count(leaf, part, &result.eax, &result.ebx, &result.ecx, &result.edx);
  return result;
}

BFloat16Unit choose_bfloat16_unit() {
  const char* variable = std::getenv("CONTRASTIVE_OPS_BFLOAT16_UNIT");
  const std::string most = variable == nullptr ? "" : variable;
  TORCH_CHECK_VALUE(
      most.empty() || most == "none" || most == "vectors" || most == "matrix",
      "CONTRASTIVE_OPS_BFLOAT16_UNIT must be none, vectors or matrix, got ",
      most);
  // compilers name these bits differently
  constexpr unsigned kAvx512Bf16 = 1u << 5;
  constexpr unsigned kAmx = (1u << 22) | (1u << 24);  // bfloat16 and tiles
  constexpr unsigned kAmd = 0x68747541;               // "Auth", of AuthenticAMD
  if (most == "none" || at::get_cpu_capability() != "AVX512" || (cpuid(7, 1).eax & kAvx512Bf16) == 0) {
    return BFloat16Unit::none;
  }
  // the system must allow the matrix unit to the process
  if (most != "vectors" && (cpuid(7, 0).edx & kAmx) == kAmx && at::cpu::init_amx()) {
    return BFloat16Unit::matrix;
  }
  // on others the vector units multiply as many bfloat16 in a cycle as float32, and packing makes them the slower ones
  return most == "vectors" || cpuid(0, 0).ebx == kAmd ? BFloat16Unit::vectors : BFloat16Unit::none;
}

}  // namespace
#endif

BFloat16Unit bfloat16_unit() {
#ifdef CONTRASTIVE_OPS_MATRIX_UNIT
  static const BFloat16Unit result = choose_bfloat16_unit();
  return result;
#else
  return BFloat16Unit::none;
#endif
}

}  // namespace contrastive_ops
