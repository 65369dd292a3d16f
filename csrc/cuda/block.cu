// Coefficients of a block of the plane, whose products with X and Y are the vendor library's, and the sums of gradients
// for scales and biases.
//
//   a block of threads has one tile:
//       pairs of the tile again, g = dL/ds
//       of pairs: coefficient g a b;  of volumes, for each member t: q y_t, q = g a b / distance, y the coordinates
//       -> the workspace, by whole rows of the tile through shared memory
//       sums over the rows and over the columns of the tile -> partial sums
//
// Q_j = L^-1 (y_j.) and q give dL/dx_i = sum_jt (q y_ijt) Q_jt - (sum_j q) x_i, and the moments sum_i (q y_ijt) x_i of
// a tuple.
#include "gradient.cuh"

namespace contrastive_ops::cuda {
namespace {

// |x|^2 - |y|^2 is off by about 4 units in the last place of |x|^2: there the distance is 0, at its minimum. The same
// as in contrastive_ops/backends/sweep.py.
constexpr float AT_MINIMUM = 4 * 1.1920929e-7f;

// Partial sums of a side of a tile, of each warp that has a part of it.
template <int PARTS, int SIZE>
struct Partials {
  float scale[PARTS][SIZE];
  float bias[PARTS][SIZE];
  float along[PARTS][SIZE];
};

// The tile's coefficients on their way to the workspace. A row is longer than a tile's by what spreads eight of them
// over all banks.
template <typename T, typename Shape>
struct Staged {
  static constexpr int pitch = Shape::cols * sizeof(T) + 8 * sizeof(T);
  alignas(16) unsigned char bytes[Shape::rows * pitch];
};

template <typename T, typename Shape>
struct Shared {
  union alignas(128) {
    unsigned char stages[Shape::stages * Shape::stage_bytes];
    struct {  // when the products are there
      Staged<T, Shape> staged;
      Partials<Shape::warps_of_cols, Shape::rows> of_rows;
      Partials<Shape::warps_of_rows, Shape::cols> of_cols;
    };
  };
  Side<Shape::rows> row;
  Side<Shape::cols> col;
  Spans<Shape> spans;
};

template <int PARTS>
__device__ __forceinline__ float total(const float* of_parts, int size) {
  float sum = 0.0f;
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    sum += of_parts[part * size];
  }
  return sum;
}

// Stores the sums of the tile's side: element `i` of `size`, at `index` of the partial sums in memory.
template <int PARTS, int SIZE>
__device__ __forceinline__ void store(const Sums& sums, const Partials<PARTS, SIZE>& partials, int i, int64_t index) {
  if (sums.scale != nullptr) {
    sums.scale[index] = total<PARTS>(&partials.scale[0][i], SIZE);
  }
  if (sums.bias != nullptr) {
    sums.bias[index] = total<PARTS>(&partials.bias[0][i], SIZE);
  }
  if (sums.along != nullptr) {
    sums.along[index] = total<PARTS>(&partials.along[0][i], SIZE);
  }
}

// A member's coefficients from registers to shared memory, and from there whole rows to the workspace.
template <typename T, typename Shape>
__device__ __forceinline__ void store_coefficients(
    const float (&coefficients)[Shape::NJ][Shape::MI][4], Staged<T, Shape>& staged, T* to, const Block& block) {
  constexpr int pitch = Staged<T, Shape>::pitch;
  const auto place = Shape::place(thread_index());
#pragma unroll
  for (int nj = 0; nj < Shape::NJ; ++nj) {
#pragma unroll
    for (int mi = 0; mi < Shape::MI; ++mi) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float low = coefficients[nj][mi][2 * half], high = coefficients[nj][mi][2 * half + 1];
        unsigned char* at = staged.bytes + place.row_of(2 * mi + half) * pitch + place.col_of(2 * nj) * sizeof(T);
        if constexpr (sizeof(T) == 2) {
          *reinterpret_cast<uint32_t*>(at) = packed(low, high, T());
        } else {
          *reinterpret_cast<float2*>(at) = {low, high};
        }
      }
    }
  }
  __syncthreads();
  constexpr int elements = 16 / sizeof(T), chunks = Shape::cols / elements;
  const int first_row = blockIdx.x * Shape::rows, first_col = blockIdx.y * Shape::cols;
  for (int i = thread_index(); i < Shape::rows * chunks; i += Shape::threads) {
    const int row = i / chunks, col = i % chunks * elements;
    // what lies beyond the columns of the block, up to its stride, is 0
    if (first_row + row < block.rows && first_col + col < block.stride) {
      const uint4 chunk = *reinterpret_cast<const uint4*>(staged.bytes + row * pitch + col * sizeof(T));
      *reinterpret_cast<uint4*>(to + static_cast<int64_t>(first_row + row) * block.stride + first_col + col) = chunk;
    }
  }
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::threads, sizeof(T) == 2 ? 2 : 1) block_kernel(
    Problem problem,
    Incoming incoming,
    const float* unit,
    T* coefficients,
    Sums row_sums,
    Sums col_sums,
    Block block,
    bool aligned) {
  using Place = typename Shape::Place;
  auto& shared = *reinterpret_cast<Shared<T, Shape>*>(shared_memory());
  const int row = block.first_row + blockIdx.x * Shape::rows, col = block.first_col + blockIdx.y * Shape::cols;
  shared.row.options.load_rows(problem, row);
  shared.col.options.load_cols(problem, col);
  shared.row.weights.load_rows(incoming, row, problem.n);
  shared.col.weights.load_cols(incoming, col, problem.m);
  if constexpr (Shape::volumes) {
    shared.spans.load_rows(problem, row);
    shared.spans.load_cols(problem, col);
  }
  const Mask mask(problem, row, col, Shape::rows, Shape::cols);
  typename Shape::Dots dots = {};
  const bool needed = Shape::volumes || mask.any(problem, Shape::rows, Shape::cols);
  if (needed) {
    Products<T, Shape> products(problem, shared.stages, aligned);
    products.begin(row, col);
    products.finish(dots);
  } else {
    __syncthreads();
  }

  const auto place = Shape::place(thread_index());
  const int warp_row = Shape::warp_row(thread_index()), warp_col = Shape::warp_col(thread_index());
  const int lane = thread_index() % 32;
  const Gradient<Place> gradient(shared.row.weights, shared.col.weights, place);
  const float reciprocal_unit = unit == nullptr ? 1.0f : 1.0f / *unit;
  float col_scale[Place::col_count] = {}, col_bias[Place::col_count] = {};
#pragma unroll
  for (int k = 0; k < Place::row_count; ++k) {
    const int i = place.row_of(k);
    const float a = shared.row.options.scale[i];
    float row_scale = 0.0f, row_bias = 0.0f, along = 0.0f;
#pragma unroll
    for (int l = 0; l < Place::col_count; ++l) {
      const int mi = k / 2, nj = l / 2, e = 2 * (k % 2) + l % 2, j = place.col_of(l);
      const float b = shared.col.options.scale[j];
      float pair = dots[nj][mi][e];
      if constexpr (Shape::volumes) {
        coordinates<Shape>(dots, shared.spans, mi, nj, e, j);
        pair = minus_distance<Shape>(dots, shared.spans.square[i], mi, nj, e);
      }
      const float g =
          needed ? gradient_of_pair<Shape::volumes>(pair, gradient, shared.row, shared.col, mask, i, j, k, l) : 0.0f;
      row_scale += g * pair * b;
      col_scale[l] += g * pair * a;
      if constexpr (Shape::volumes) {
        const bool at_minimum = -pair <= sqrtf(shared.spans.square[i] * AT_MINIMUM);
        const float q = at_minimum ? 0.0f : g * (a * b) / -pair;
        along += q;
#pragma unroll
        for (int t = 0; t < Shape::members; ++t) {
          dots[t * Shape::NJ + nj][mi][e] *= q * reciprocal_unit;
        }
      } else {
        row_bias += g;
        col_bias[l] += g;
        dots[nj][mi][e] = g * (a * b) * reciprocal_unit;
      }
    }
    row_scale = over_cols(row_scale, Add());
    row_bias = over_cols(row_bias, Add());
    along = over_cols(along, Add());
    if (lane % 4 == 0) {
      shared.of_rows.scale[warp_col][i] = row_scale;
      shared.of_rows.bias[warp_col][i] = row_bias;
      shared.of_rows.along[warp_col][i] = along;
    }
  }
#pragma unroll
  for (int l = 0; l < Place::col_count; ++l) {
    const float scale = over_rows(col_scale[l], Add()), bias = over_rows(col_bias[l], Add());
    if (lane / 4 == 0) {
      shared.of_cols.scale[warp_row][place.col_of(l)] = scale;
      shared.of_cols.bias[warp_row][place.col_of(l)] = bias;
    }
  }

  if (coefficients != nullptr) {
#pragma unroll
    for (int t = 0; t < Shape::members; ++t) {
      const auto& of_member = *reinterpret_cast<const float (*)[Shape::NJ][Shape::MI][4]>(&dots[t * Shape::NJ]);
      const int64_t matrix = static_cast<int64_t>(block.rows) * block.stride;
      if (t > 0) {
        __syncthreads();  // the member before has left shared memory
      }
      store_coefficients<T, Shape>(of_member, shared.staged, coefficients + t * matrix, block);
    }
  } else {
    __syncthreads();
  }
  const int own_row = thread_index(), own_col = own_row - Shape::rows;
  const int block_row = blockIdx.x * Shape::rows + own_row, block_col = blockIdx.y * Shape::cols + own_col;
  if (own_row < Shape::rows && block_row < block.rows) {
    store(row_sums, shared.of_rows, own_row, blockIdx.y * static_cast<int64_t>(block.rows) + block_row);
  }
  if (own_col >= 0 && own_col < Shape::cols && block_col < block.cols) {
    store(col_sums, shared.of_cols, own_col, blockIdx.x * static_cast<int64_t>(block.cols) + block_col);
  }
}

}  // namespace

const char* block(
    const Problem& problem,
    const Incoming& incoming,
    const float* unit,
    void* coefficients,
    const Sums& row,
    const Sums& col,
    const Block& block,
    cudaStream_t stream) {
  return for_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    return for_members(problem.members, [&](auto shape) {
      using Shape = decltype(shape);
      const int tile_rows = (block.rows + Shape::rows - 1) / Shape::rows;
      const int tile_cols = (block.cols + Shape::cols - 1) / Shape::cols;
      return launch(
          block_kernel<T, Shape>,
          dim3(tile_rows, tile_cols),
          Shape::threads,
          sizeof(Shared<T, Shape>),
          stream,
          problem,
          incoming,
          unit,
          static_cast<T*>(coefficients),
          row,
          col,
          block,
          is_aligned(problem));
    });
  });
}

}  // namespace contrastive_ops::cuda
