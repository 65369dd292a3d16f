// Joins partial statistics, one thread a row, in their order.
#include "device.cuh"
#include "sweep.h"

namespace contrastive_ops::cuda {
namespace {

constexpr int THREADS = 256;

__device__ __forceinline__ void fold(const Part& part, int parts, int index, int size, float& maximum, float& sum) {
  for (int i = 0; i < parts; ++i) {
    const int64_t at = i * static_cast<int64_t>(size) + index;
    const float before = maximum;
    maximum = fmaxf(maximum, part.maximum[at]);
    const float shift = maximum == -INFINITY ? 0.0f : maximum;
    sum = sum * exponential(before - shift) + part.sum[at] * exponential(part.maximum[at] - shift);
  }
}

__global__ void __launch_bounds__(THREADS)
    merge_kernel(Part part, int parts, Part mirror, int mirrors, float* maximum, float* log_sum, int size) {
  const int index = blockIdx.x * THREADS + threadIdx.x;
  if (index < size) {
    float best = -INFINITY, sum = 0.0f;
    fold(part, parts, index, size, best, sum);
    if (mirror.maximum != nullptr) {
      fold(mirror, mirrors, index, size, best, sum);
    }
    maximum[index] = sum == sum ? best : sum;  // NaN is in the sums only, so far
    log_sum[index] = logf(sum);
  }
}

}  // namespace

const char* merge(
    const Part& part,
    int parts,
    const Part& mirror,
    int mirrors,
    float* maximum,
    float* log_sum,
    int size,
    cudaStream_t stream) {
  const int blocks = size / THREADS + (size % THREADS > 0);
  return launch(merge_kernel, dim3(blocks), THREADS, 0, stream, part, parts, mirror, mirrors, maximum, log_sum, size);
}

}  // namespace contrastive_ops::cuda
