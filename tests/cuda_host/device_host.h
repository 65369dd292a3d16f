// CUDA C++ on the CPU: what csrc/cuda/device.cuh has of a GPU, and the CUDA spellings that g++ does not know.
//
// A fiber for every thread of a block, all on one thread of the operating system, one block after another. Warp-wide
// operations wait until every lane of their mask has come to them; lanes that come to different ones, or never, are
// reported with file and line, and launch() returns the report. What reads or writes memory for a kernel is inline
// here, so that sanitizers see it; the rest is in runtime.cpp, which they do not see.
//
// Seed, copies and counts of bank conflicts: the functions at the end of this file.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __launch_bounds__(...)

// Of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace contrastive_ops::cuda {

namespace host {

// Where a kernel calls a function: a default argument of everything that can be reported.
struct Place {
  const char* file;
  int line;

  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

struct Copy {
  void* shared;
  const void* global;
  bool inside;
};

// Ends the grid; launch() returns the message.
[[noreturn]] void fail(const char* message, Place place);

// A barrier of the block, and whether any thread had a predicate.
bool synchronise_block(bool predicate, Place place);
void synchronise_warp(uint32_t mask, Place place);

int lane_index();
uint64_t shuffle(uint32_t mask, uint64_t bits, int source, Place place);
uint32_t vote(uint32_t mask, bool predicate, Place place);
int minimum(uint32_t mask, int value, Place place);
int maximum(uint32_t mask, int value, Place place);

enum class Format { bfloat16, float16, tf32 };
void multiply(Format format, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place);
// `row` is what lies at `shared`.
void load(bool transposed, uint32_t (&r)[4], const uint4& row, const void* shared, Place place);

unsigned char* shared_memory();
// 16 bytes of the block's shared memory, aligned to 16?
void check_shared(const void* shared, const char* operation, Place place);
// Remembers a copy for the count of bank conflicts.
void count_copy(const void* shared, Place place);

// Copies are carried out at once, or put off until they are waited for.
bool copies_are_eager();
void put_off(const Copy& copy);
void end_group();
// The next copy that is due when no more than `groups` groups may be under way.
bool take_due(int groups, Copy& copy);

const char* run_grid(dim3 grid, int threads, int shared_bytes, void (*body)(void*), void* kernel);

template <typename T>
T shuffle_value(uint32_t mask, T value, int source, Place place) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, source & 31, place);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline void carry_out(const Copy& copy) {
  const uint4 zero = {};
  *static_cast<uint4*>(copy.shared) = copy.inside ? *static_cast<const uint4*>(copy.global) : zero;
}

// The row of this lane is read here, where sanitizers know which thread reads it.
inline void load_row(bool transposed, uint32_t (&r)[4], const void* shared, Place place) {
  check_shared(shared, transposed ? "load_matrices_transposed" : "load_matrices", place);
  const uint4 row = *static_cast<const uint4*>(shared);
  load(transposed, r, row, shared, place);
}

}  // namespace host

inline unsigned char* shared_memory() {
  return host::shared_memory();
}

inline int thread_index() {
  return static_cast<int>(threadIdx.x);
}

inline void copy_async(void* shared, const void* global, bool inside, host::Place place = host::Place::here()) {
  host::check_shared(shared, "copy_async", place);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    host::fail("copy_async: the address in global memory is not aligned to 16 bytes", place);
  }
  host::count_copy(shared, place);
  const host::Copy copy = {shared, global, inside};
  if (host::copies_are_eager()) {
    host::carry_out(copy);
  } else {
    host::put_off(copy);
  }
}

inline void copy_async_commit() {
  host::end_group();
}

template <int groups>
void copy_async_wait() {
  host::Copy copy;
  while (host::take_due(groups, copy)) {
    host::carry_out(copy);
  }
}

inline void load_matrices(uint32_t (&r)[4], const void* shared, host::Place place = host::Place::here()) {
  host::load_row(false, r, shared, place);
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void* shared, host::Place place = host::Place::here()) {
  host::load_row(true, r, shared, place);
}

template <typename T>
void multiply_add(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], host::Place place = host::Place::here());

template <>
inline void multiply_add<__nv_bfloat16>(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], host::Place place) {
  host::multiply(host::Format::bfloat16, d, a, b, place);
}

template <>
inline void multiply_add<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], host::Place place) {
  host::multiply(host::Format::float16, d, a, b, place);
}

template <>
inline void multiply_add<float>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], host::Place place) {
  host::multiply(host::Format::tf32, d, a, b, place);
}

inline uint32_t round_to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (std::isnan(value)) {
    return 0x7fffe000;  // rounding would carry the bits of some into the sign
  }
  return (bits + 0x1000) & ~0x1fffu;  // half of the last bit that stays: ties away from zero
}

inline float exponential(float x) {
  return std::exp2(x * 1.44269504f);  // rounded before the power is taken, as __expf does
}

inline float reciprocal(float x) {
  return 1.0f / x;
}

template <typename... Parameters, typename... Arguments>
const char* launch(
    void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, cudaStream_t, Arguments... arguments) {
  auto body = [&] { kernel(arguments...); };
  return host::run_grid(
      grid, threads, shared_bytes, [](void* kernel) { (*static_cast<decltype(body)*>(kernel))(); }, &body);
}

}  // namespace contrastive_ops::cuda

namespace cuda_host = contrastive_ops::cuda::host;

inline void __syncthreads(cuda_host::Place place = cuda_host::Place::here()) {
  cuda_host::synchronise_block(false, place);
}

inline int __syncthreads_or(int predicate, cuda_host::Place place = cuda_host::Place::here()) {
  return cuda_host::synchronise_block(predicate != 0, place);
}

inline void __syncwarp(uint32_t mask = ~0u, cuda_host::Place place = cuda_host::Place::here()) {
  cuda_host::synchronise_warp(mask, place);
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, cuda_host::Place place = cuda_host::Place::here()) {
  return cuda_host::shuffle_value(mask, value, source, place);
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int distance, cuda_host::Place place = cuda_host::Place::here()) {
  return cuda_host::shuffle_value(mask, value, cuda_host::lane_index() ^ distance, place);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, cuda_host::Place place = cuda_host::Place::here()) {
  return cuda_host::vote(mask, predicate != 0, place);
}

inline int __any_sync(uint32_t mask, int predicate, cuda_host::Place place = cuda_host::Place::here()) {
  return cuda_host::vote(mask, predicate != 0, place) != 0;
}

inline int __reduce_min_sync(uint32_t mask, int value, cuda_host::Place place = cuda_host::Place::here()) {
  return cuda_host::minimum(mask, value, place);
}

inline int __reduce_max_sync(uint32_t mask, int value, cuda_host::Place place = cuda_host::Place::here()) {
  return cuda_host::maximum(mask, value, place);
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

extern "C" {

// Blocks and threads run in an order that the seed shuffles. `eager` copies are carried out at once: a buffer that is
// used again too early shows; the others when they are waited for: a missing wait shows. At first: seed 0, not eager.
void contrastive_ops_host_configure(uint64_t seed, bool eager);

// Wavefronts of shared memory since the last call, a line for every load_matrices and copy_async in the kernels:
// "operation file:line, wavefronts taken, least possible". With bank conflicts more are taken than the least.
const char* contrastive_ops_host_wavefronts();

// Of the last launch.
int contrastive_ops_host_threads();
int contrastive_ops_host_shared_bytes();
}
