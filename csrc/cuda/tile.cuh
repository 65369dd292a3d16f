// One tile of the plane: which thread has which pair, and the products of the tile on the matrix unit.
//
//   the 8 warps of a block, 2 x 4, have 128 rows x 128 columns of pairs, or of volumes of P vectors 128 x 64 or 128 x
//   32 for each slab of 64 bytes of the features, of which four are under way at once:
//       copy the slabs of the tile's rows of x and y to shared memory, asynchronously
//       dots += (slab of x) (slab of y)^T
//
// The rows of y of a tile are those of all P members: member t of column j is row t * cols + j of the slab, so that a
// warp has all members of its columns.
#pragma once

#include "device.cuh"
#include "sweep.h"

namespace contrastive_ops::cuda {

constexpr uint32_t ALL_LANES = 0xffffffff;
constexpr float INF = INFINITY;

// What a thread has of a product of the matrix unit: of each 16 x 8 part (mi, nj) of its warp's tile the elements e,
// in row `row` + 16 mi + 8 (e / 2) and column `col` + 8 nj + e % 2.
template <int MI, int NJ>
struct Fragment {
  static constexpr int row_count = 2 * MI;  // of a thread; its row k is `row` + 8 k
  static constexpr int col_count = 2 * NJ;
  int row, col;

  // Of a warp whose tile begins at (warp_row, warp_col).
  __device__ Fragment(int lane, int warp_row, int warp_col) {
    row = warp_row + lane / 4;
    col = warp_col + 2 * (lane % 4);
  }

  // Calls visit(mi, nj, e, k, l) for every element, by rows: it lies in the thread's row k and column l.
  template <typename Visit>
  static __device__ __forceinline__ void for_each(Visit visit) {
#pragma unroll
    for (int k = 0; k < row_count; ++k) {
#pragma unroll
      for (int l = 0; l < col_count; ++l) {
        visit(k / 2, l / 2, 2 * (k % 2) + l % 2, k, l);
      }
    }
  }

  __device__ int row_of(int k) const {
    return row + 8 * k;
  }

  __device__ int col_of(int l) const {
    return col + 8 * (l / 2) + l % 2;
  }
};

// Reductions of a warp: over the columns of each row, which four lanes hold, and over the rows of each column.
template <typename Join>
__device__ __forceinline__ float over_cols(float value, Join join) {
  value = join(value, __shfl_xor_sync(ALL_LANES, value, 1));
  return join(value, __shfl_xor_sync(ALL_LANES, value, 2));
}

template <typename Join>
__device__ __forceinline__ float over_rows(float value, Join join) {
  value = join(value, __shfl_xor_sync(ALL_LANES, value, 4));
  value = join(value, __shfl_xor_sync(ALL_LANES, value, 8));
  return join(value, __shfl_xor_sync(ALL_LANES, value, 16));
}

template <typename Join>
__device__ __forceinline__ float over_warp(float value, Join join) {
  return over_rows(over_cols(value, join), join);
}

struct Add {
  __device__ __forceinline__ float operator()(float a, float b) const {
    return a + b;
  }
};

struct Maximum {
  __device__ __forceinline__ float operator()(float a, float b) const {
    return fmaxf(a, b);
  }
};

struct Minimum {
  __device__ __forceinline__ float operator()(float a, float b) const {
    return fminf(a, b);
  }
};

// The tile of `forward` and `block` for volumes of P vectors a column, or for pairs: P = 0. With two forms of a pair
// at once it has half the columns, as has the tile of two vectors.
template <int P, int FORMS = 1>
struct Tile {
  static constexpr bool volumes = P > 0;
  static constexpr int members = volumes ? P : 1;
  static constexpr int rows = 128;
  static constexpr int cols = members * FORMS == 1 ? 128 : members * FORMS == 2 ? 64 : 32;
  static constexpr int warps_of_rows = 2, warps_of_cols = 4;
  static constexpr int threads = 32 * warps_of_rows * warps_of_cols;
  static constexpr int warp_rows = rows / warps_of_rows, warp_cols = cols / warps_of_cols;
  static constexpr int MI = warp_rows / 16, NJ = warp_cols / 8;
  static constexpr int parts = members * NJ;  // parts of 8 columns, part t * NJ + nj of member t

  static constexpr int slab_bytes = 64, stages = 4;
  static constexpr int slab_rows = rows + members * cols;
  static constexpr int stage_bytes = slab_rows * slab_bytes;

  using Place = Fragment<MI, NJ>;
  using Dots = float[parts][MI][4];

  static __device__ int warp_row(int thread) {
    return thread / 32 / warps_of_cols;
  }

  static __device__ int warp_col(int thread) {
    return thread / 32 % warps_of_cols;
  }

  static __device__ Place place(int thread) {
    return Place(thread % 32, warp_row(thread) * warp_rows, warp_col(thread) * warp_cols);
  }
};

// Stores sums over the pairs of a warp's part of the tile: of rows for its warp of columns, and the other way round.
template <typename Shape, int ROW_COUNT, int COL_COUNT>
__device__ __forceinline__ void store_sums(
    float (&of_rows)[Shape::warps_of_cols][Shape::rows],
    float (&of_cols)[Shape::warps_of_rows][Shape::cols],
    const float (&row_sum)[ROW_COUNT],
    const float (&col_sum)[COL_COUNT],
    const typename Shape::Place& place) {
  const int thread = thread_index(), lane = thread % 32;
#pragma unroll
  for (int k = 0; k < ROW_COUNT; ++k) {
    const float sum = over_cols(row_sum[k], Add());
    if (lane % 4 == 0) {
      of_rows[Shape::warp_col(thread)][place.row_of(k)] = sum;
    }
  }
#pragma unroll
  for (int l = 0; l < COL_COUNT; ++l) {
    const float sum = over_rows(col_sum[l], Add());
    if (lane / 4 == 0) {
      of_cols[Shape::warp_row(thread)][place.col_of(l)] = sum;
    }
  }
}

// Where 16 bytes of a slab's row lie: the four of two rows fill all banks, and the exchange spreads those that eight
// lanes read at once, of eight rows, over all banks, too.
__device__ __forceinline__ int slab_offset(int row, int chunk) {
  return row * 64 + ((chunk ^ (row / 2 % 4)) * 16);
}

// 16 bytes of a row to shared memory, of which those beyond its last element are 0. `row` is null beyond the last row.
// `aligned`: every row begins at a multiple of 16 bytes. Else, elements one by one, which are there at once.
template <typename T>
__device__ __forceinline__ void copy_chunk(
    unsigned char* shared, const T* row, int feature, int features, bool aligned) {
  constexpr int elements = 16 / sizeof(T);
  if (aligned) {
    const bool inside = row != nullptr && feature < features;
    copy_async(shared, inside ? row + feature : row, inside);
  } else {
    T values[elements];
#pragma unroll
    for (int i = 0; i < elements; ++i) {
      values[i] = row != nullptr && feature + i < features ? row[feature + i] : T(0.0f);
    }
#pragma unroll
    for (int i = 0; i < elements; ++i) {
      reinterpret_cast<T*>(shared)[i] = values[i];
    }
  }
}

// The products of tiles, slab by slab. `begin` may be called while the products of the tile before are in use.
template <typename T, typename Shape>
struct Products {
  static constexpr int slab_features = Shape::slab_bytes / sizeof(T);

  const Problem& problem;
  Form form;
  unsigned char* stages;  // in shared memory
  bool aligned;
  int row = 0, col = 0;

  __device__ Products(const Problem& problem, const Form& form, unsigned char* stages, bool aligned)
      : problem(problem), form(form), stages(stages), aligned(aligned) {}

  // Starts to copy the first slabs of the tile at (row, col).
  __device__ void begin(int tile_row, int tile_col) {
    row = tile_row;
    col = tile_col;
    const int thread = thread_index();
#pragma unroll 1
    for (int slab = 0; slab < Shape::stages - 1; ++slab) {
      copy(slab, thread);
    }
  }

  // The row of x or y that is this row of a slab; null beyond the last.
  __device__ __forceinline__ const T* source(int slab_row) const {
    if (slab_row < Shape::rows) {
      const T* x = static_cast<const T*>(form.x);
      return row + slab_row < problem.n ? x + static_cast<int64_t>(row + slab_row) * form.features : nullptr;
    }
    const T* y = static_cast<const T*>(form.y);
    const int member = (slab_row - Shape::rows) / Shape::cols;
    const int of_col = col + (slab_row - Shape::rows) % Shape::cols;
    const int64_t vector = static_cast<int64_t>(of_col) * Shape::members + member;
    return of_col < problem.m ? y + vector * form.features : nullptr;
  }

  // A group of copies for each slab, also where there is none: the waits count groups.
  __device__ __forceinline__ void copy(int slab, int thread) {
    constexpr int rows_at_once = Shape::threads / 4;
    const int chunk = thread % 4;
    const int feature = slab * slab_features + chunk * (16 / static_cast<int>(sizeof(T)));
    if (slab * slab_features < form.features) {
      unsigned char* stage = stages + slab % Shape::stages * Shape::stage_bytes;
#pragma unroll 2
      for (int first = 0; first < Shape::slab_rows; first += rows_at_once) {
        const int slab_row = first + thread / 4;
        if (slab_row < Shape::slab_rows) {
          unsigned char* to = stage + slab_offset(slab_row, chunk);
          copy_chunk(to, source(slab_row), feature, form.features, aligned);
        }
      }
    }
    copy_async_commit();
  }

  // The products of the tile that `begin` began. Afterwards all threads have read all slabs.
  __device__ void finish(typename Shape::Dots& dots) {
#pragma unroll
    for (int part = 0; part < Shape::parts; ++part) {
#pragma unroll
      for (int mi = 0; mi < Shape::MI; ++mi) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          dots[part][mi][e] = 0.0f;
        }
      }
    }
    const int thread = thread_index(), slabs = (form.features + slab_features - 1) / slab_features;
#pragma unroll 1
    for (int slab = 0; slab < slabs; ++slab) {
      copy_async_wait<Shape::stages - 2>();
      // the slab is there for all, and all have read the one before, whose stage takes the next
      __syncthreads();
      copy(slab + Shape::stages - 1, thread);
      multiply(dots, stages + slab % Shape::stages * Shape::stage_bytes, thread);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void multiply(typename Shape::Dots& dots, const unsigned char* stage, int thread) {
    const int lane = thread % 32;
    const int x_row = Shape::warp_row(thread) * Shape::warp_rows + lane % 16;
#pragma unroll
    for (int step = 0; step < 2; ++step) {  // of 32 bytes
      uint32_t a[Shape::MI][4];
#pragma unroll
      for (int mi = 0; mi < Shape::MI; ++mi) {
        load_matrices(a[mi], stage + slab_offset(x_row + 16 * mi, 2 * step + lane / 16));
      }
      [[maybe_unused]] uint32_t a_low[Shape::MI][4];
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int mi = 0; mi < Shape::MI; ++mi) {
          split(a[mi], a_low[mi]);
        }
      }
#pragma unroll
      for (int part = 0; part < Shape::parts; part += 2) {  // the lower lanes address this part, the upper the next
        const int own = min(part + lane / 16, Shape::parts - 1);
        const int y_row = Shape::rows + own / Shape::NJ * Shape::cols + Shape::warp_col(thread) * Shape::warp_cols +
                          own % Shape::NJ * 8 + lane % 8;
        uint32_t both[4];
        load_matrices(both, stage + slab_offset(y_row, 2 * step + lane / 8 % 2));
#pragma unroll
        for (int of_two = 0; of_two < 2; ++of_two) {
          if (part + of_two < Shape::parts) {
            uint32_t b[2] = {both[2 * of_two], both[2 * of_two + 1]};
            if constexpr (sizeof(T) == 2) {
              multiply_part(dots[part + of_two], a, b);
            } else {
              multiply_part(dots[part + of_two], a, a_low, b);
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_part(
      float (&dots)[Shape::MI][4], const uint32_t (&a)[Shape::MI][4], const uint32_t (&b)[2]) {
#pragma unroll
    for (int mi = 0; mi < Shape::MI; ++mi) {
      multiply_add<T>(dots[mi], a[mi], b);
    }
  }

  // Of float32: v = high + low, and of the product all but low low, whose share is 2^-22. The matrix unit truncates
  // what it adds up, always towards 0: so a step begins at 0, and an ordinary addition rounds it to nearest.
  __device__ __forceinline__ void multiply_part(
      float (&dots)[Shape::MI][4],
      const uint32_t (&a)[Shape::MI][4],
      const uint32_t (&a_low)[Shape::MI][4],
      uint32_t (&b)[2]) {
    uint32_t b_low[2];
    split(b, b_low);
    if (problem.tf32) {
      multiply_part(dots, a, b);
      return;
    }
#pragma unroll
    for (int mi = 0; mi < Shape::MI; ++mi) {
      float sum[4] = {};
      multiply_add<T>(sum, a_low[mi], b);  // the small ones first
      multiply_add<T>(sum, a[mi], b_low);
      multiply_add<T>(sum, a[mi], b);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        dots[mi][e] += sum[e];
      }
    }
  }

  // The bits of float32 values become those of the nearest TF32; `low` is what that leaves.
  template <int COUNT>
  static __device__ __forceinline__ void split(uint32_t (&values)[COUNT], uint32_t (&low)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const float value = __uint_as_float(values[i]);
      values[i] = round_to_tf32(value);
      low[i] = round_to_tf32(value - __uint_as_float(values[i]));
    }
  }
};

// Whether rows of the features can be copied in chunks of 16 bytes, of both forms of a pair.
inline bool is_aligned(const Problem& problem) {
  const int bytes = problem.dtype == Dtype::float32 ? 4 : 2;
  const auto fits = [&](const Form& form) {
    const auto x = reinterpret_cast<uintptr_t>(form.x), y = reinterpret_cast<uintptr_t>(form.y);
    return static_cast<int64_t>(form.features) * bytes % 16 == 0 && x % 16 == 0 && y % 16 == 0;
  };
  return fits({problem.x, problem.y, problem.features}) && fits(problem.second.form);
}

// Calls run with a value of the type of the features.
template <typename Run>
const char* for_dtype(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::float32:
      return run(float());
    case Dtype::bfloat16:
      return run(__nv_bfloat16());
    default:
      return run(__half());
  }
}

}  // namespace contrastive_ops::cuda
