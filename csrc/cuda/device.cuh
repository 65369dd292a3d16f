// What the kernels need of a GPU beyond CUDA C++: matrix units, asynchronous copies, shared memory. sm_80 and up.
//
// tests/cuda_host has the same functions for the CPU; all else that the kernels use keeps its CUDA spelling there, such
// as threadIdx, __syncthreads and __shfl_xor_sync.
#pragma once

#include <cstdint>

#ifdef CONTRASTIVE_OPS_CUDA_HOST
#include "device_host.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace contrastive_ops::cuda {

// The dynamic shared memory of the block, aligned to 128 bytes. Kernels have no other.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// threadIdx.x, read again: what is computed from it inside a loop is not moved out of it, where it would take registers
// from all that the loop does.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(index));
  return index;
}

// Copies 16 bytes from global to shared memory, both aligned to 16, or writes zeros where not `inside`: then nothing is
// read. The bytes are there after copy_async_wait and, for other threads, a barrier.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(inside ? 16 : 0)
      : "memory");
}

// Ends a group of copies; an empty group is one, too.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until no more than `groups` groups of this thread are under way.
template <int groups>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(groups) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8, 16 bytes aligned to
// 16, and gets in r[i] the elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

// The same of the transposed matrices.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

// d += a b in float32, a 16 x K, b K x 8. K is 32 bytes of a row: 16 elements of 16 bits, or 8 of TF32.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void multiply_add<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The operands are TF32: float32 with the last 13 bits 0, as round_to_tf32 gives them.
template <>
__device__ __forceinline__ void multiply_add<float>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The bits of the nearest TF32.
__device__ __forceinline__ uint32_t round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
  return bits;
}

// e^x by the hardware's 2^x: exact at 0, and 0 at -inf.
__device__ __forceinline__ float exponential(float x) {
  return __expf(x);
}

// 1 / x of an x from 1 to 2, within two units in the last place.
__device__ __forceinline__ float reciprocal(float x) {
  return __fdividef(1.0f, x);
}

// Parameters that take their type from elsewhere, so that arguments are converted to it.
template <typename Type>
struct Same {
  using type = Type;
};

// Launches a kernel of one-dimensional blocks; the error in words, or null.
template <typename... Parameters>
const char* launch(
    void (*kernel)(Parameters...),
    dim3 grid,
    int threads,
    int shared_bytes,
    cudaStream_t stream,
    typename Same<Parameters>::type... arguments) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    void* pointers[] = {&arguments...};
    const auto function = reinterpret_cast<const void*>(kernel);
    error = cudaLaunchKernel(function, grid, dim3(threads), pointers, shared_bytes, stream);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace contrastive_ops::cuda

#endif
