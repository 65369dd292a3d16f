// The logit of every row with the column that it leaves out, one warp a row; -inf where it leaves out none.
#include "tile.cuh"

namespace contrastive_ops::cuda {
namespace {

constexpr int WARPS = 4;

template <typename T>
__global__ void __launch_bounds__(32 * WARPS) excluded_kernel(Problem problem, float* logits) {
  const Vectors& v = problem.vectors;
  const int lane = threadIdx.x % 32, row = blockIdx.x * WARPS + threadIdx.x / 32;
  const int index = row < problem.n ? v.row_exclude[row] : -1;
  const int col = index < problem.m ? index : -1;
  float dot = 0.0f;
  if (col >= 0) {
    const T* x = static_cast<const T*>(problem.x) + row * static_cast<int64_t>(problem.features);
    const T* y = static_cast<const T*>(problem.y) + col * static_cast<int64_t>(problem.features);
    for (int feature = lane; feature < problem.features; feature += 32) {
      dot += static_cast<float>(x[feature]) * static_cast<float>(y[feature]);
    }
  }
  dot = over_warp(dot, Add());
  if (lane == 0 && row < problem.n) {
    float logit = -INF;
    if (col >= 0) {
      const float a = v.row_scale == nullptr ? 1.0f : v.row_scale[row];
      const float b = v.col_scale == nullptr ? 1.0f : v.col_scale[col];
      const float c = v.row_bias == nullptr ? 0.0f : v.row_bias[row];
      const float d = v.col_bias == nullptr ? 0.0f : v.col_bias[col];
      logit = dot * (a * b) + (c + d);
    }
    logits[row] = logit;
  }
}

}  // namespace

const char* excluded(const Problem& problem, float* logits, cudaStream_t stream) {
  const int blocks = problem.n / WARPS + (problem.n % WARPS > 0);
  return for_dtype(problem.dtype, [&](auto element) {
    return launch(excluded_kernel<decltype(element)>, dim3(blocks), 32 * WARPS, 0, stream, problem, logits);
  });
}

}  // namespace contrastive_ops::cuda
