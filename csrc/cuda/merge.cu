// Joins partial statistics, one thread a row, in their order.
#include "device.cuh"
#include "sweep.h"

namespace contrastive_ops::cuda {
namespace {

constexpr int THREADS = 256;

struct Joined {
  float maximum = -INFINITY, sum = 0.0f, moment = 0.0f;

  __device__ __forceinline__ void fold(const Part& part, int parts, int index, int size) {
    for (int i = 0; i < parts; ++i) {
      const int64_t at = i * static_cast<int64_t>(size) + index;
      const float before = maximum;
      maximum = fmaxf(maximum, part.maximum[at]);
      const float shift = maximum == -INFINITY ? 0.0f : maximum;
      // what is joined here is of many pairs: its error may not grow with the exponent
      const float decay = expf(before - shift), share = expf(part.maximum[at] - shift);
      sum = sum * decay + part.sum[at] * share;
      if (part.moment != nullptr) {  // a part without a share adds nothing, even if it is infinite
        moment = (decay == 0.0f ? 0.0f : moment * decay) + (share == 0.0f ? 0.0f : part.moment[at] * share);
      }
    }
  }
};

__global__ void __launch_bounds__(THREADS) merge_kernel(
    Part part, int parts, Part mirror, int mirrors, float* maximum, float* log_sum, float* mean, int size) {
  const int index = blockIdx.x * THREADS + threadIdx.x;
  if (index < size) {
    Joined joined;
    joined.fold(part, parts, index, size);
    if (mirror.maximum != nullptr) {
      joined.fold(mirror, mirrors, index, size);
    }
    const float sum = joined.sum;
    maximum[index] = sum == sum ? joined.maximum : sum;  // NaN is in the sums only, so far
    log_sum[index] = logf(sum);
    if (mean != nullptr) {
      mean[index] = sum == 0.0f ? 0.0f : joined.moment / sum;
    }
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
    float* mean,
    int size,
    cudaStream_t stream) {
  const int blocks = size / THREADS + (size % THREADS > 0);
  return launch(
      merge_kernel, dim3(blocks), THREADS, 0, stream, part, parts, mirror, mirrors, maximum, log_sum, mean, size);
}

}  // namespace contrastive_ops::cuda
