// Gradients of rows with all their features in registers: 16-bit features, up to 256. With the sides swapped, of
// columns.
//
//   a block has a tile of rows, each warp 16 or 32 of them, and a strip of columns; x of the rows in shared memory
//   for each tile of 32 columns, of which two are in shared memory, one to come:
//       pairs, in the registers in which the product left them
//       rows_kernel: g = dL/ds
//           dX += (g a b / unit) Y
//       attention_kernel, where rows alone have gradients: t = e^(s - maximum), the maximum of the row so far
//           sum = sum decay + t, d lse/dX = d lse/dX decay + (t a b / unit) Y, divided by the sum in the end
//
// No atomics: strips are added up afterwards, in their order.
#include "gradient.cuh"

namespace contrastive_ops::cuda {
namespace {

using Lse = LogSumExp<Tile<0>>;

// For up to FEATURES features: the gradient takes 128 registers of a thread, or 64.
template <int FEATURES>
struct RowsTile {
  static constexpr int features = FEATURES;
  static constexpr int warps = 4, threads = 32 * warps;
  static constexpr int MI = FEATURES <= 128 ? 2 : 1;
  static constexpr int rows = 16 * MI * warps, cols = 32, NJ = cols / 8;
  static constexpr int row_bytes = 2 * FEATURES;

  using Place = Fragment<MI, NJ>;
};

template <typename Shape>
struct Shared {
  alignas(128) unsigned char x[Shape::rows * Shape::row_bytes];
  unsigned char y[2][Shape::cols * Shape::row_bytes];
  Side<Lse, Shape::rows> row;
  Side<Lse, Shape::cols> col[2];
};

// Where 16 bytes of a row lie: the exchange spreads those that eight lanes read at once, of eight rows, over all banks.
template <typename Shape>
__device__ __forceinline__ int offset(int row, int chunk) {
  return row * Shape::row_bytes + ((chunk ^ (row % 8)) * 16);
}

// Starts to copy `rows` rows of features to shared memory; beyond the last row and feature they are 0.
template <typename Shape, typename T>
__device__ __forceinline__ void copy_rows(
    unsigned char* shared, const void* source, int first, int rows, int last, int features, bool aligned) {
  constexpr int chunks = Shape::row_bytes / 16;
  for (int i = thread_index(); i < rows * chunks; i += Shape::threads) {
    const int row = i / chunks, chunk = i % chunks;
    const T* from = static_cast<const T*>(source) + static_cast<int64_t>(first + row) * features;
    unsigned char* to = shared + offset<Shape>(row, chunk);
    copy_chunk(to, first + row < last ? from : nullptr, chunk * 8, features, aligned);
  }
}

// The tiles of columns of a strip in which a pair counts, one after another, while the next is on its way.
template <typename T, typename Shape>
struct Tiles {
  const Problem& problem;
  const Incoming& incoming;
  Shared<Shape>& shared;
  bool aligned;
  int row = blockIdx.x * Shape::rows, last_col, next_col, col = 0, stage = 1;

  __device__ Tiles(
      const Problem& problem, const Incoming& incoming, Shared<Shape>& shared, int cols_per_strip, bool aligned)
      : problem(problem), incoming(incoming), shared(shared), aligned(aligned) {
    copy_rows<Shape, T>(shared.x, problem.x, row, Shape::rows, problem.n, problem.features, aligned);
    shared.row.options.load_rows(problem, row);
    shared.row.weights.load_rows(incoming, row, problem.n);
    const int first_col = blockIdx.y * cols_per_strip;
    last_col = min(first_col + cols_per_strip, problem.m);
    next_col = from(first_col);
    copy(next_col, 0);
  }

  // Goes to the next tile, which lies at `col` of the plane and in the `stage` of shared memory; false after the last.
  __device__ __forceinline__ bool next() {
    col = next_col;
    stage = 1 - stage;
    copy_async_wait<0>();
    if (col < last_col) {
      __syncthreads();  // the tile is there for all, and all are done with the one before, whose stage the next takes
      next_col = from(col + Shape::cols);
      copy(next_col, 1 - stage);
    }
    return col < last_col;
  }

  __device__ __forceinline__ int from(int candidate) const {
    while (candidate < last_col &&
           !Mask(problem, row, candidate, Shape::rows, Shape::cols).any(problem, Shape::rows, Shape::cols)) {
      candidate += Shape::cols;
    }
    return candidate;
  }

  __device__ __forceinline__ void copy(int to_come, int at) {
    if (to_come < last_col) {
      copy_rows<Shape, T>(shared.y[at], problem.y, to_come, Shape::cols, problem.m, problem.features, aligned);
      shared.col[at].options.load_cols(problem, to_come);
      shared.col[at].weights.load_cols(incoming, to_come, problem.m);
    }
    copy_async_commit();
  }
};

template <typename Shape>
using Pairs = float[Shape::NJ][Shape::MI][4];

template <typename Shape>
using Slope = float[Shape::features / 8][Shape::MI][4];

template <typename Shape>
__device__ __forceinline__ int warp_row(int thread) {
  return thread / 32 * (16 * Shape::MI);
}

template <typename Shape>
__device__ __forceinline__ typename Shape::Place place_of(int thread) {
  return typename Shape::Place(thread % 32, warp_row<Shape>(thread), 0);
}

// pairs = X Y^T of a tile.
template <typename T, typename Shape>
__device__ __forceinline__ void multiply(
    Pairs<Shape>& pairs, const unsigned char* x, const unsigned char* y, int features) {
  const int thread = thread_index(), lane = thread % 32;
#pragma unroll
  for (int step = 0; step < Shape::features / 16; ++step) {
    if (step * 16 < features) {
      uint32_t a[Shape::MI][4];
#pragma unroll
      for (int mi = 0; mi < Shape::MI; ++mi) {
        const int x_row = warp_row<Shape>(thread) + 16 * mi + lane % 16;
        load_matrices(a[mi], x + offset<Shape>(x_row, 2 * step + lane / 16));
      }
#pragma unroll
      for (int nj = 0; nj < Shape::NJ; nj += 2) {
        uint32_t b[4];
        load_matrices(b, y + offset<Shape>((nj + lane / 16) * 8 + lane % 8, 2 * step + lane / 8 % 2));
#pragma unroll
        for (int mi = 0; mi < Shape::MI; ++mi) {
          multiply_add<T>(pairs[nj][mi], a[mi], {b[0], b[1]});
          multiply_add<T>(pairs[nj + 1][mi], a[mi], {b[2], b[3]});
        }
      }
    }
  }
}

// slope += weights Y of a tile, the weights rounded to the dtype of the features.
template <typename T, typename Shape>
__device__ __forceinline__ void accumulate(
    Slope<Shape>& slope, const Pairs<Shape>& weights, const unsigned char* y, int features) {
  const int lane = thread_index() % 32;
#pragma unroll
  for (int nj = 0; nj < Shape::NJ; nj += 2) {  // 16 columns: two parts of the weights are an operand of the product
    uint32_t a[Shape::MI][4];
#pragma unroll
    for (int mi = 0; mi < Shape::MI; ++mi) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* two = &weights[nj + i / 2][mi][2 * (i % 2)];
        a[mi][i] = packed(two[0], two[1], T());
      }
    }
#pragma unroll
    for (int part = 0; part < Shape::features / 8; part += 2) {
      if (part * 8 < features) {
        uint32_t b[4];
        load_matrices_transposed(b, y + offset<Shape>(nj * 8 + lane % 16, part + lane / 16));
#pragma unroll
        for (int mi = 0; mi < Shape::MI; ++mi) {
          multiply_add<T>(slope[part][mi], a[mi], {b[0], b[1]});
          multiply_add<T>(slope[part + 1][mi], a[mi], {b[2], b[3]});
        }
      }
    }
  }
}

// Stores a thread's row k of a slope, times `factor`, from `to` on.
template <typename Shape, typename Out>
__device__ __forceinline__ void store_row(const Slope<Shape>& slope, int k, float factor, Out* to, int features) {
#pragma unroll
  for (int part = 0; part < Shape::features / 8; ++part) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int feature = part * 8 + 2 * (thread_index() % 4) + e;
      if (feature < features) {
        to[feature] = Out(slope[part][k / 2][2 * (k % 2) + e] * factor);
      }
    }
  }
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::threads, 2) rows_kernel(
    Problem problem,
    Incoming incoming,
    const float* unit,
    void* gradient,
    bool gradient_is_float,
    Sums sums,
    int cols_per_strip,
    bool aligned) {
  using Place = typename Shape::Place;
  auto& shared = *reinterpret_cast<Shared<Shape>*>(shared_memory());
  Tiles<T, Shape> tiles(problem, incoming, shared, cols_per_strip, aligned);
  Slope<Shape> slope = {};
  float scale_sum[Place::row_count] = {}, bias_sum[Place::row_count] = {};
  const float reciprocal_unit = unit == nullptr ? 1.0f : 1.0f / *unit;
  while (tiles.next()) {
    const auto& cols = shared.col[tiles.stage];
    Pairs<Shape> pairs = {};
    multiply<T, Shape>(pairs, shared.x, shared.y[tiles.stage], problem.features);
    const Mask mask(problem, tiles.row, tiles.col, Shape::rows, Shape::cols);
    const Place place = place_of<Shape>(thread_index());
    Lse::Gradient<Place> of_tile(problem, shared.row.weights, cols.weights, place);
    Place::for_each([&](int mi, int nj, int e, int k, int l) {
      const int i = place.row_of(k), j = place.col_of(l);
      const float pair = pairs[nj][mi][e], b = cols.options.scale[j];
      const float logit = logit_of_pair<false>(pair, shared.row.options, cols.options, i, j);
      const bool takes_part = mask.takes_part(shared.row.options, cols.options, i, j);
      if (l == 0) {
        of_tile.begin_row(shared.row.weights, i);
      }
      const float g = gradient_of_pair(logit, takes_part, of_tile, shared.row, cols, mask, i, j, l);
      scale_sum[k] += g * b * pair;
      bias_sum[k] += g;
      // all scales before it is rounded: in float16 the product, in units, is what has room
      pairs[nj][mi][e] = g * b * shared.row.options.scale[i] * reciprocal_unit;
    });
    if (gradient != nullptr) {
      accumulate<T, Shape>(slope, pairs, shared.y[tiles.stage], problem.features);
    }
  }

  const Place place = place_of<Shape>(thread_index());
#pragma unroll
  for (int k = 0; k < Place::row_count; ++k) {
    const float scale = over_cols(scale_sum[k], Add()), bias = over_cols(bias_sum[k], Add());
    const int row = tiles.row + place.row_of(k);
    const int64_t at = blockIdx.y * static_cast<int64_t>(problem.n) + row;
    if (row < problem.n) {
      if (thread_index() % 4 == 0 && sums.scale != nullptr) {
        sums.scale[at] = scale;
      }
      if (thread_index() % 4 == 0 && sums.bias != nullptr) {
        sums.bias[at] = bias;
      }
      const float factor = unit == nullptr ? 1.0f : *unit;
      if (gradient != nullptr && gradient_is_float) {
        store_row<Shape>(slope, k, factor, static_cast<float*>(gradient) + at * problem.features, problem.features);
      } else if (gradient != nullptr) {
        store_row<Shape>(slope, k, factor, static_cast<T*>(gradient) + at * problem.features, problem.features);
      }
    }
  }
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::threads, 2)
    attention_kernel(Problem problem, const float* unit, Part part, Slopes slopes, int cols_per_strip, bool aligned) {
  using Place = typename Shape::Place;
  auto& shared = *reinterpret_cast<Shared<Shape>*>(shared_memory());
  const Incoming nothing{};
  Tiles<T, Shape> tiles(problem, nothing, shared, cols_per_strip, aligned);
  Slope<Shape> slope = {};
  float maximum[Place::row_count], sum[Place::row_count] = {}, scale_sum[Place::row_count] = {};
#pragma unroll
  for (int k = 0; k < Place::row_count; ++k) {
    maximum[k] = -INF;
  }
  const float reciprocal_unit = unit == nullptr ? 1.0f : 1.0f / *unit;
  while (tiles.next()) {
    const auto& cols = shared.col[tiles.stage];
    Pairs<Shape> pairs = {};
    multiply<T, Shape>(pairs, shared.x, shared.y[tiles.stage], problem.features);
    const Mask mask(problem, tiles.row, tiles.col, Shape::rows, Shape::cols);
    const Place place = place_of<Shape>(thread_index());
    const auto logit_of = [&](int mi, int nj, int e, int k, int l) {
      const int i = place.row_of(k), j = place.col_of(l);
      const bool takes_part = mask.takes_part(shared.row.options, cols.options, i, j) &&
                              !mask.excluded(shared.row.options, cols.options, i, j);
      return takes_part ? logit_of_pair<false>(pairs[nj][mi][e], shared.row.options, cols.options, i, j) : -INF;
    };
    float largest[Place::row_count];
#pragma unroll
    for (int k = 0; k < Place::row_count; ++k) {
      largest[k] = -INF;
    }
    Place::for_each(
        [&](int mi, int nj, int e, int k, int l) { largest[k] = fmaxf(largest[k], logit_of(mi, nj, e, k, l)); });
    // what was added up so far is relative to the maximum so far
#pragma unroll
    for (int k = 0; k < Place::row_count; ++k) {
      const float before = maximum[k];
      maximum[k] = fmaxf(before, over_cols(largest[k], Maximum()));
      const float decay = exponential(before - shift_of(maximum[k]));
      sum[k] *= decay;
      scale_sum[k] *= decay;
#pragma unroll
      for (int feature = 0; feature < Shape::features / 8; ++feature) {
        slope[feature][k / 2][2 * (k % 2)] *= decay;
        slope[feature][k / 2][2 * (k % 2) + 1] *= decay;
      }
    }
    Place::for_each([&](int mi, int nj, int e, int k, int l) {
      const float term = exponential(logit_of(mi, nj, e, k, l) - shift_of(maximum[k]));
      const float weighted = term * cols.options.scale[place.col_of(l)];
      sum[k] += term;
      scale_sum[k] += weighted * pairs[nj][mi][e];
      pairs[nj][mi][e] = weighted * shared.row.options.scale[place.row_of(k)] * reciprocal_unit;
    });
    accumulate<T, Shape>(slope, pairs, shared.y[tiles.stage], problem.features);
  }

  const Place place = place_of<Shape>(thread_index());
#pragma unroll
  for (int k = 0; k < Place::row_count; ++k) {
    const float total = over_cols(sum[k], Add()), scale = over_cols(scale_sum[k], Add());
    const float share = total == 0.0f ? 1.0f : 1.0f / total;
    const int row = tiles.row + place.row_of(k);
    const int64_t at = blockIdx.y * static_cast<int64_t>(problem.n) + row;
    if (row < problem.n) {
      if (thread_index() % 4 == 0) {
        part.maximum[at] = maximum[k];
        part.sum[at] = total;
        slopes.scale[at] = scale * share;
      }
      const float factor = share * (unit == nullptr ? 1.0f : *unit);
      store_row<Shape>(slope, k, factor, slopes.x + at * problem.features, problem.features);
    }
  }
}

template <typename Run>
auto for_features(int features, Run run) {
  if (features <= 64) {
    return run(RowsTile<64>());
  }
  return features <= 128 ? run(RowsTile<128>()) : run(RowsTile<256>());
}

template <typename Run>
const char* for_rows_tile(const Problem& problem, int cols_per_strip, Run run) {
  const auto of_type = [&](auto element) {
    return for_features(problem.features, [&](auto shape) {
      const int tiles = (problem.n + shape.rows - 1) / shape.rows;
      const int strips = (problem.m + cols_per_strip - 1) / cols_per_strip;
      return run(element, shape, dim3(tiles, strips), is_aligned(problem));
    });
  };
  return problem.dtype == Dtype::bfloat16 ? of_type(__nv_bfloat16()) : of_type(__half());
}

}  // namespace

Tiling rows_tiling(Dtype dtype, int features) {
  if (dtype == Dtype::float32 || features > 256) {
    return {0, 0};
  }
  return for_features(features, [](auto shape) {
    using Shape = decltype(shape);
    return Tiling{Shape::rows, Shape::cols};
  });
}

const char* rows(
    const Problem& problem,
    const Incoming& incoming,
    const float* unit,
    void* gradient,
    bool gradient_is_float,
    const Sums& sums,
    int cols_per_strip,
    cudaStream_t stream) {
  return for_rows_tile(problem, cols_per_strip, [&](auto element, auto shape, dim3 grid, bool aligned) {
    using Shape = decltype(shape);
    return launch(
        rows_kernel<decltype(element), Shape>,
        grid,
        Shape::threads,
        sizeof(Shared<Shape>),
        stream,
        problem,
        incoming,
        unit,
        gradient,
        gradient_is_float,
        sums,
        cols_per_strip,
        aligned);
  });
}

const char* attention(
    const Problem& problem,
    const float* unit,
    const Part& row,
    const Slopes& slopes,
    int cols_per_strip,
    cudaStream_t stream) {
  return for_rows_tile(problem, cols_per_strip, [&](auto element, auto shape, dim3 grid, bool aligned) {
    using Shape = decltype(shape);
    return launch(
        attention_kernel<decltype(element), Shape>,
        grid,
        Shape::threads,
        sizeof(Shared<Shape>),
        stream,
        problem,
        unit,
        row,
        slopes,
        cols_per_strip,
        aligned);
  });
}

}  // namespace contrastive_ops::cuda
