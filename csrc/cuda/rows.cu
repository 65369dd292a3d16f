// Gradients of rows with all their features in registers: 16-bit features, up to 256. With the sides swapped, of
// columns.
//
//   a block has a tile of rows, each warp 16 or 32 of them, and a strip of columns; x of the rows in shared memory
//   for each tile of 32 columns, of which two are in shared memory, one to come:
//       pairs again, g = dL/ds
//       dX += (g a b / unit) Y, with g in the registers in which the product left it
//
// No atomics: strips are added up afterwards, in their order.
#include "gradient.cuh"

namespace contrastive_ops::cuda {
namespace {

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
  Side<Shape::rows> row;
  Side<Shape::cols> col[2];
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
  constexpr int MI = Shape::MI, NJ = Shape::NJ;
  auto& shared = *reinterpret_cast<Shared<Shape>*>(shared_memory());
  const int row = blockIdx.x * Shape::rows;
  const int first_col = blockIdx.y * cols_per_strip, last_col = min(first_col + cols_per_strip, problem.m);
  const int steps = (problem.features + 15) / 16;

  // The next tile of columns with a pair that counts, from `col` on.
  const auto next = [&](int col) {
    while (col < last_col &&
           !Mask(problem, row, col, Shape::rows, Shape::cols).any(problem, Shape::rows, Shape::cols)) {
      col += Shape::cols;
    }
    return col;
  };
  // A tile of columns to the place `parity`; a group of copies also where there is none.
  const auto begin = [&](int col, int parity) {
    if (col < last_col) {
      copy_rows<Shape, T>(shared.y[parity], problem.y, col, Shape::cols, problem.m, problem.features, aligned);
      shared.col[parity].options.load_cols(problem, col);
      shared.col[parity].weights.load_cols(incoming, col, problem.m);
    }
    copy_async_commit();
  };

  copy_rows<Shape, T>(shared.x, problem.x, row, Shape::rows, problem.n, problem.features, aligned);
  shared.row.options.load_rows(problem, row);
  shared.row.weights.load_rows(incoming, row, problem.n);
  float grad[Shape::features / 8][MI][4] = {};
  float scale_sum[Place::row_count] = {}, bias_sum[Place::row_count] = {};
  const float reciprocal_unit = unit == nullptr ? 1.0f : 1.0f / *unit;
  int parity = 0, col = next(first_col);
  begin(col, parity);
  while (col < last_col) {
    const int next_col = next(col + Shape::cols);
    copy_async_wait<0>();
    __syncthreads();  // the tile is there for all, and all are done with the one before, whose place the next takes
    begin(next_col, 1 - parity);
    const unsigned char* y = shared.y[parity];
    const int lane = thread_index() % 32, warp_row = thread_index() / 32 * (16 * MI);

    float pairs[NJ][MI][4] = {};
#pragma unroll
    for (int step = 0; step < Shape::features / 16; ++step) {
      if (step < steps) {
        uint32_t a[MI][4];
#pragma unroll
        for (int mi = 0; mi < MI; ++mi) {
          const int x_row = warp_row + 16 * mi + lane % 16;
          load_matrices(a[mi], shared.x + offset<Shape>(x_row, 2 * step + lane / 16));
        }
#pragma unroll
        for (int nj = 0; nj < NJ; nj += 2) {
          uint32_t b[4];
          load_matrices(b, y + offset<Shape>((nj + lane / 16) * 8 + lane % 8, 2 * step + lane / 8 % 2));
#pragma unroll
          for (int mi = 0; mi < MI; ++mi) {
            multiply_add<T>(pairs[nj][mi], a[mi], {b[0], b[1]});
            multiply_add<T>(pairs[nj + 1][mi], a[mi], {b[2], b[3]});
          }
        }
      }
    }

    const Mask mask(problem, row, col, Shape::rows, Shape::cols);
    const Place place(lane, warp_row, 0);
    const auto& cols = shared.col[parity];
    const Gradient<Place> of_tile(shared.row.weights, cols.weights, place);
    Place::for_each([&](int mi, int nj, int e, int k, int l) {
      const int i = place.row_of(k), j = place.col_of(l);
      const float pair = pairs[nj][mi][e], b = cols.options.scale[j];
      const float g = gradient_of_pair<false>(pair, of_tile, shared.row, cols, mask, i, j, k, l);
      scale_sum[k] += g * b * pair;
      bias_sum[k] += g;
      // all scales before it is rounded: `unit` is a bound of the product
      pairs[nj][mi][e] = g * b * shared.row.options.scale[i] * reciprocal_unit;
    });

    if (gradient != nullptr) {
#pragma unroll
      for (int nj = 0; nj < NJ; nj += 2) {  // 16 columns: two parts of the pairs are an operand of the next product
        uint32_t a[MI][4];
#pragma unroll
        for (int mi = 0; mi < MI; ++mi) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* two = &pairs[nj + i / 2][mi][2 * (i % 2)];
            a[mi][i] = packed(two[0], two[1], T());
          }
        }
#pragma unroll
        for (int part = 0; part < Shape::features / 8; part += 2) {
          if (part / 2 < steps) {
            uint32_t b[4];
            load_matrices_transposed(b, y + offset<Shape>(nj * 8 + lane % 16, part + lane / 16));
#pragma unroll
            for (int mi = 0; mi < MI; ++mi) {
              multiply_add<T>(grad[part][mi], a[mi], {b[0], b[1]});
              multiply_add<T>(grad[part + 1][mi], a[mi], {b[2], b[3]});
            }
          }
        }
      }
    }
    col = next_col;
    parity = 1 - parity;
  }
  copy_async_wait<0>();  // those of x, where no tile was needed

  const int lane = thread_index() % 32;
  const Place place(lane, thread_index() / 32 * (16 * MI), 0);
  const auto of_strip = [&](int i) { return blockIdx.y * static_cast<int64_t>(problem.n) + row + i; };
#pragma unroll
  for (int k = 0; k < Place::row_count; ++k) {
    const float scale = over_cols(scale_sum[k], Add()), bias = over_cols(bias_sum[k], Add());
    const int i = place.row_of(k);
    if (row + i < problem.n) {
      if (lane % 4 == 0 && sums.scale != nullptr) {
        sums.scale[of_strip(i)] = scale;
      }
      if (lane % 4 == 0 && sums.bias != nullptr) {
        sums.bias[of_strip(i)] = bias;
      }
      if (gradient != nullptr) {
        const float size = unit == nullptr ? 1.0f : *unit;
#pragma unroll
        for (int part = 0; part < Shape::features / 8; ++part) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int feature = part * 8 + 2 * (lane % 4) + e;
            const int64_t at = of_strip(i) * problem.features + feature;
            const float value = grad[part][k / 2][2 * (k % 2) + e] * size;
            if (feature < problem.features) {
              if (gradient_is_float) {
                static_cast<float*>(gradient)[at] = value;
              } else {
                static_cast<T*>(gradient)[at] = T(value);
              }
            }
          }
        }
      }
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
  const auto run = [&](auto element) {
    using T = decltype(element);
    return for_features(problem.features, [&](auto shape) {
      using Shape = decltype(shape);
      const int tiles = (problem.n + Shape::rows - 1) / Shape::rows;
      const int strips = (problem.m + cols_per_strip - 1) / cols_per_strip;
      return launch(
          rows_kernel<T, Shape>,
          dim3(tiles, strips),
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
          is_aligned(problem));
    });
  };
  return problem.dtype == Dtype::bfloat16 ? run(__nv_bfloat16()) : run(__half());
}

}  // namespace contrastive_ops::cuda
