// Sets of K vectors factored, one warp a set, all in registers: what gramian_volume and the tuples of volume_logsumexp
// need.
//
//   G = products of the K vectors, in float64, lanes sharing the features
//   L L^T = G, row after row; a vector that adds nothing to the span of those before it has a row of zeros in L^-1
//   -> L^-1, and the volume, which is the product of the diagonal of L
#include "tile.cuh"

namespace contrastive_ops::cuda {
namespace {

constexpr int WARPS = 4;
constexpr double INSIDE = 1e-12;  // the same as in contrastive_ops/backends/tuples.py, which says why

__device__ __forceinline__ double sum_of_warp(double value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(ALL_LANES, value, distance);
  }
  return value;
}

template <typename T, int K>
__global__ void __launch_bounds__(32 * WARPS)
    factor_kernel(const T* vectors, int64_t count, int features, double* inverses, double* volumes) {
  const int lane = threadIdx.x % 32;
  const int64_t set = blockIdx.x * static_cast<int64_t>(WARPS) + threadIdx.x / 32;
  if (set >= count) {  // for all lanes of the warp
    return;
  }
  double gram[K][K] = {};
  for (int feature = lane; feature < features; feature += 32) {
    double values[K];
#pragma unroll
    for (int t = 0; t < K; ++t) {
      values[t] = static_cast<double>(static_cast<float>(vectors[(set * K + t) * features + feature]));
    }
#pragma unroll
    for (int t = 0; t < K; ++t) {
#pragma unroll
      for (int s = 0; s <= t; ++s) {
        gram[t][s] += values[t] * values[s];
      }
    }
  }
#pragma unroll
  for (int t = 0; t < K; ++t) {
#pragma unroll
    for (int s = 0; s <= t; ++s) {
      gram[t][s] = sum_of_warp(gram[t][s]);
    }
  }
  double lower[K][K] = {}, inverse[K][K] = {}, volume = 1.0;
#pragma unroll
  for (int t = 0; t < K; ++t) {
    double pivot = gram[t][t];
#pragma unroll
    for (int s = 0; s < t; ++s) {
      pivot -= lower[t][s] * lower[t][s];
    }
    const bool inside = pivot <= INSIDE * gram[t][t];
    const double length = inside ? 0.0 : sqrt(pivot), reciprocal = inside ? 0.0 : 1.0 / length;
    volume *= length;
#pragma unroll
    for (int u = t + 1; u < K; ++u) {
      double below = gram[u][t];
#pragma unroll
      for (int s = 0; s < t; ++s) {
        below -= lower[u][s] * lower[t][s];
      }
      lower[u][t] = below * reciprocal;
    }
    inverse[t][t] = reciprocal;
#pragma unroll
    for (int s = 0; s < t; ++s) {
      double sum = 0.0;
#pragma unroll
      for (int r = s; r < t; ++r) {
        sum += lower[t][r] * inverse[r][s];
      }
      inverse[t][s] = -reciprocal * sum;
    }
  }
  if (lane == 0) {
    volumes[set] = volume;
#pragma unroll
    for (int t = 0; t < K; ++t) {
#pragma unroll
      for (int s = 0; s < K; ++s) {
        inverses[(set * K + t) * K + s] = inverse[t][s];
      }
    }
  }
}

}  // namespace

const char* factor(
    const void* vectors,
    Dtype dtype,
    int64_t count,
    int members,
    int features,
    double* inverse,
    double* volume,
    cudaStream_t stream) {
  if (count == 0) {
    return nullptr;
  }
  return for_dtype(dtype, [&](auto element) -> const char* {
    using T = decltype(element);
    const auto run = [&](auto kernel) {
      const dim3 blocks(static_cast<unsigned>((count + WARPS - 1) / WARPS));
      const auto of_type = static_cast<const T*>(vectors);
      return launch(kernel, blocks, 32 * WARPS, 0, stream, of_type, count, features, inverse, volume);
    };
    switch (members) {
      case 1:
        return run(factor_kernel<T, 1>);
      case 2:
        return run(factor_kernel<T, 2>);
      case 3:
        return run(factor_kernel<T, 3>);
      case 4:
        return run(factor_kernel<T, 4>);
      case 5:
        return run(factor_kernel<T, 5>);
      default:
        return "sets of 1 to 5 vectors are factored";
    }
  });
}

}  // namespace contrastive_ops::cuda
