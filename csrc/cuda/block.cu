// Coefficients of a block of the plane, whose products with X and Y are the vendor library's, and the sums of gradients
// for scales and biases.
//
//   a block of threads has one tile:
//       pairs of the tile again, g = dL/ds
//       of pairs: coefficient g a b, and where a teacher has gradients dL/dz a' b'
//       of volumes, for each member t: q y_t, q = g a b / distance, y the coordinates
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

// Partial sums of the gradients of a form of the pairs, of each warp that has a part of the tile.
template <typename Shape>
struct Partials {
  float row_scale[Shape::warps_of_cols][Shape::rows];
  float row_bias[Shape::warps_of_cols][Shape::rows];
  float col_scale[Shape::warps_of_rows][Shape::cols];
  float col_bias[Shape::warps_of_rows][Shape::cols];
};

// The tile's coefficients on their way to the workspace. A row is longer than a tile's by what spreads eight of them
// over all banks.
template <typename T, typename Shape>
struct Staged {
  static constexpr int pitch = Shape::cols * sizeof(T) + 8 * sizeof(T);
  alignas(16) unsigned char bytes[Shape::rows * pitch];
};

template <typename T, typename Reduction>
struct Shared {
  using Shape = typename Reduction::Shape;
  union alignas(128) {
    unsigned char stages[Shape::stages * Shape::stage_bytes];
    struct {  // when the products are there
      Staged<T, Shape> staged;
      Partials<Shape> of_logits, of_teacher;
      float along[Shape::warps_of_cols][Shape::rows];
    };
  };
  Side<Reduction, Shape::rows> row;
  Side<Reduction, Shape::cols> col;
  Spans<Shape> spans;
  SecondOptions<Shape, Reduction::with> second;
};

// The sums of a thread's pairs, of the row at which it is and of all its columns.
template <typename Shape>
struct Tally {
  using Place = typename Shape::Place;
  float row_scale = 0.0f, row_bias = 0.0f, col_scale[Place::col_count] = {}, col_bias[Place::col_count] = {};

  // Of a pair of column l: the gradient of its logit, the pair, and the scales of its row and column.
  __device__ __forceinline__ void add(float g, float pair, float a, float b, int l) {
    row_scale += g * pair * b;
    col_scale[l] += g * pair * a;
    if constexpr (!Shape::volumes) {
      row_bias += g;
      col_bias[l] += g;
    }
  }

  // Row i of the tile is done.
  __device__ __forceinline__ void store_row(Partials<Shape>& partials, int i) {
    const float scale = over_cols(row_scale, Add()), bias = over_cols(row_bias, Add());
    if (thread_index() % 4 == 0) {
      partials.row_scale[Shape::warp_col(thread_index())][i] = scale;
      partials.row_bias[Shape::warp_col(thread_index())][i] = bias;
    }
    row_scale = row_bias = 0.0f;
  }

  __device__ __forceinline__ void store_cols(Partials<Shape>& partials, const Place& place) const {
#pragma unroll
    for (int l = 0; l < Place::col_count; ++l) {
      const float scale = over_rows(col_scale[l], Add()), bias = over_rows(col_bias[l], Add());
      if (thread_index() % 32 / 4 == 0) {
        partials.col_scale[Shape::warp_row(thread_index())][place.col_of(l)] = scale;
        partials.col_bias[Shape::warp_row(thread_index())][place.col_of(l)] = bias;
      }
    }
  }
};

// Stores the sums of element i of a side of the tile at `index` of the partial sums in memory, where they are wanted.
template <int PARTS, int SIZE>
__device__ __forceinline__ void store(float* sums, const float (&partials)[PARTS][SIZE], int i, int64_t index) {
  if (sums != nullptr) {
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      sum += partials[part][i];
    }
    sums[index] = sum;
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

template <typename T, typename Reduction>
__global__ void __launch_bounds__(Reduction::Shape::threads, sizeof(T) == 2 ? 2 : 1) block_kernel(
    Problem problem,
    Incoming incoming,
    const float* unit,
    T* coefficients,
    int planes,
    Sums row_sums,
    Sums col_sums,
    Block block,
    bool aligned) {
  using Shape = typename Reduction::Shape;
  using Place = typename Shape::Place;
  constexpr bool taught = Reduction::with == With::teacher;
  auto& shared = *reinterpret_cast<Shared<T, Reduction>*>(shared_memory());
  const int row = block.first_row + blockIdx.x * Shape::rows, col = block.first_col + blockIdx.y * Shape::cols;
  shared.row.options.load_rows(problem, row);
  shared.col.options.load_cols(problem, col);
  shared.row.weights.load_rows(incoming, row, problem.n);
  shared.col.weights.load_cols(incoming, col, problem.m);
  shared.second.load_rows(problem, row);
  shared.second.load_cols(problem, col);
  if constexpr (Shape::volumes) {
    shared.spans.load_rows(problem, row);
    shared.spans.load_cols(problem, col);
  }
  const Mask mask(problem, row, col, Shape::rows, Shape::cols);
  typename Shape::Dots dots = {};
  SecondValues<Shape, Reduction::with> second = {};
  Pairs<T, Reduction> pairs(problem, shared.stages, aligned);
  if (Shape::volumes || mask.any(problem, Shape::rows, Shape::cols)) {
    pairs.begin(row, col);
    pairs.finish(dots, second, shared.second, row, col);
  } else {
    __syncthreads();
  }

  const auto place = Shape::place(thread_index());
  pairs.choose(
      second, shared.second, shared.row.options, shared.col.options, mask, [&](int mi, int nj, int e, int i, int j) {
        return logit_of_pair<false>(dots[nj][mi][e], shared.row.options, shared.col.options, i, j);
      });
  typename Reduction::template Gradient<Place> gradient(problem, shared.row.weights, shared.col.weights, place);
  const float reciprocal_unit = unit == nullptr ? 1.0f : 1.0f / *unit;
  [[maybe_unused]] const float teacher_unit = unit == nullptr || planes == 1 ? 1.0f : 1.0f / unit[1];
  Tally<Shape> tally;
  [[maybe_unused]] Tally<Shape> of_teacher;
#pragma unroll
  for (int k = 0; k < Place::row_count; ++k) {
    const int i = place.row_of(k);
    const float a = shared.row.options.scale[i];
    float along = 0.0f;
    gradient.begin_row(shared.row.weights, i);
#pragma unroll
    for (int l = 0; l < Place::col_count; ++l) {
      const int mi = k / 2, nj = l / 2, e = 2 * (k % 2) + l % 2, j = place.col_of(l);
      const float b = shared.col.options.scale[j];
      float pair = dots[nj][mi][e];
      if constexpr (Shape::volumes) {
        coordinates<Shape>(dots, shared.spans, mi, nj, e, j);
        pair = minus_distance<Shape>(dots, shared.spans.square[i], mi, nj, e);
      }
      const float logit = logit_of_pair<Shape::volumes>(pair, shared.row.options, shared.col.options, i, j);
      bool takes_part;
      if constexpr (Reduction::with == With::nothing) {
        takes_part = mask.takes_part(shared.row.options, shared.col.options, i, j);
      } else {
        takes_part = second.chosen.has(k, l);
      }
      float g = 0.0f;
      if constexpr (taught) {
        const auto& teacher_row = shared.second.row;
        const auto& teacher_col = shared.second.col;
        const float teacher_pair = second.dots[nj][mi][e];
        const float teacher =
            pairs.has_second ? logit_of_pair<false>(teacher_pair, teacher_row, teacher_col, i, j) : logit;
        float h = 0.0f;
        g = gradient.of_pair(logit, teacher, takes_part, shared.row.weights, shared.col.weights, i, j, l, h);
        if (pairs.has_second) {
          of_teacher.add(h, teacher_pair, teacher_row.scale[i], teacher_col.scale[j], l);
          second.dots[nj][mi][e] = h * (teacher_row.scale[i] * teacher_col.scale[j]) * teacher_unit;
        } else {
          g += h;
        }
      } else {
        g = gradient_of_pair(logit, takes_part, gradient, shared.row, shared.col, mask, i, j, l);
      }
      tally.add(g, pair, a, b, l);
      if constexpr (Shape::volumes) {
        const bool at_minimum = -pair <= sqrtf(shared.spans.square[i] * AT_MINIMUM);
        const float q = at_minimum ? 0.0f : g * (a * b) / -pair;
        along += q;
#pragma unroll
        for (int t = 0; t < Shape::members; ++t) {
          dots[t * Shape::NJ + nj][mi][e] *= q * reciprocal_unit;
        }
      } else {
        dots[nj][mi][e] = g * (a * b) * reciprocal_unit;
      }
    }
    tally.store_row(shared.of_logits, i);
    if constexpr (taught) {
      of_teacher.store_row(shared.of_teacher, i);
    }
    if constexpr (Shape::volumes) {
      along = over_cols(along, Add());
      if (thread_index() % 4 == 0) {
        shared.along[Shape::warp_col(thread_index())][i] = along;
      }
    }
  }
  tally.store_cols(shared.of_logits, place);
  if constexpr (taught) {
    of_teacher.store_cols(shared.of_teacher, place);
  }

  if (coefficients != nullptr) {
    const int64_t plane = static_cast<int64_t>(block.rows) * block.stride;
#pragma unroll
    for (int t = 0; t < Shape::members; ++t) {
      const auto& of_member = *reinterpret_cast<const float (*)[Shape::NJ][Shape::MI][4]>(&dots[t * Shape::NJ]);
      if (t > 0) {
        __syncthreads();  // the member before has left shared memory
      }
      store_coefficients<T, Shape>(of_member, shared.staged, coefficients + t * plane, block);
    }
    if constexpr (taught) {
      if (planes == 2) {
        __syncthreads();  // the coefficients before have left shared memory
        store_coefficients<T, Shape>(second.dots, shared.staged, coefficients + plane, block);
      }
    }
  } else {
    __syncthreads();
  }
  const int own_row = thread_index(), own_col = own_row - Shape::rows;
  const int block_row = blockIdx.x * Shape::rows + own_row, block_col = blockIdx.y * Shape::cols + own_col;
  if (own_row < Shape::rows && block_row < block.rows) {
    const int64_t index = blockIdx.y * static_cast<int64_t>(block.rows) + block_row;
    store(row_sums.scale, shared.of_logits.row_scale, own_row, index);
    store(row_sums.bias, shared.of_logits.row_bias, own_row, index);
    if constexpr (Shape::volumes) {
      store(row_sums.along, shared.along, own_row, index);
    }
    if constexpr (taught) {
      store(row_sums.teacher_scale, shared.of_teacher.row_scale, own_row, index);
      store(row_sums.teacher_bias, shared.of_teacher.row_bias, own_row, index);
    }
  }
  if (own_col >= 0 && own_col < Shape::cols && block_col < block.cols) {
    const int64_t index = blockIdx.x * static_cast<int64_t>(block.cols) + block_col;
    store(col_sums.scale, shared.of_logits.col_scale, own_col, index);
    store(col_sums.bias, shared.of_logits.col_bias, own_col, index);
    if constexpr (taught) {
      store(col_sums.teacher_scale, shared.of_teacher.col_scale, own_col, index);
      store(col_sums.teacher_bias, shared.of_teacher.col_bias, own_col, index);
    }
  }
}

}  // namespace

const char* block(
    const Problem& problem,
    const Incoming& incoming,
    const float* unit,
    void* coefficients,
    int planes,
    const Sums& row,
    const Sums& col,
    const Block& block,
    cudaStream_t stream) {
  return for_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    return for_reduction(problem, [&](auto reduction) {
      using Reduction = decltype(reduction);
      using Shape = typename Reduction::Shape;
      const int tile_rows = (block.rows + Shape::rows - 1) / Shape::rows;
      const int tile_cols = (block.cols + Shape::cols - 1) / Shape::cols;
      return launch(
          block_kernel<T, Reduction>,
          dim3(tile_rows, tile_cols),
          Shape::threads,
          sizeof(Shared<T, Reduction>),
          stream,
          problem,
          incoming,
          unit,
          static_cast<T*>(coefficients),
          planes,
          row,
          col,
          block,
          is_aligned(problem));
    });
  });
}

}  // namespace contrastive_ops::cuda
