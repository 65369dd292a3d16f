// Maxima and sums of e^s over rows and columns, in one visit of every tile.
//
//   a block has a group of rows and a strip of columns; for each tile of rows, for each tile of columns:
//       s = logits of the tile, -inf where a pair does not take part
//       each warp: maxima and sums of e^s over the rows and columns of its part, to shared memory
//       one thread a row: fold them into the statistics of the row, in shared memory
//       one thread a column: fold them into the statistics of the column, in memory that no other thread touches
//
// The copies for the next tile are under way while this one's logits are reduced. No atomics: fixed order, same bits.
#include "logits.cuh"

namespace contrastive_ops::cuda {
namespace {

// Statistics of a set: an empty one is (-inf, 0). NaN shows in the sum; the maxima pass it over.
struct Statistics {
  float maximum = -INF, sum = 0.0f, total = 0.0f;
};

// What the warps found of `SIZE` rows, or columns, in the `PARTS` parts of the tile.
template <int PARTS, int SIZE>
struct Partials {
  float maximum[PARTS][SIZE];
  float sum[PARTS][SIZE];
  float total[PARTS][SIZE];
};

template <typename Shape>
struct Shared {
  alignas(128) unsigned char stages[Shape::stages * Shape::stage_bytes];
  Options<Shape::rows> row;
  Options<Shape::cols> col;
  Spans<Shape> spans;
  Partials<Shape::warps_of_cols, Shape::rows> of_rows;
  Partials<Shape::warps_of_rows, Shape::cols> of_cols;
  Statistics statistics[Shape::rows];                       // each row's own thread's
  float shift[Shape::warps_of_rows][Shape::warps_of_cols];  // NaN where a warp's sums are relative to their own maxima
};

// A sum relative to `from` as one relative to the maximum `to`.
__device__ __forceinline__ float rescaled(float sum, float from, float to) {
  return sum == 0.0f ? 0.0f
                     : sum * exponential(from - shift_of(to));  // shift and maximum of an empty part lie far apart
}

template <int PARTS, int SIZE, typename Shift>
__device__ __forceinline__ void fold(
    Statistics& into, const Partials<PARTS, SIZE>& partials, int i, bool totals, Shift shift) {
  const float before = into.maximum;
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    into.maximum = fmaxf(into.maximum, partials.maximum[part][i]);
  }
  into.sum = rescaled(into.sum, before, into.maximum);
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    const float common = shift(part);
    const float from = common != common ? shift_of(partials.maximum[part][i]) : common;
    into.sum += rescaled(partials.sum[part][i], from, into.maximum);
    into.total += totals ? partials.total[part][i] : 0.0f;
  }
}

// The logits of the tile in the first NJ parts of `dots`.
template <typename Shape>
__device__ __forceinline__ void logits(
    typename Shape::Dots& dots, const Shared<Shape>& shared, const Mask& mask, const typename Shape::Place& place) {
  Shape::Place::for_each([&](int mi, int nj, int e, int k, int l) {
    const int i = place.row_of(k), j = place.col_of(l);
    if constexpr (Shape::volumes) {
      coordinates<Shape>(dots, shared.spans, mi, nj, e, j);
      dots[nj][mi][e] = minus_distance<Shape>(dots, shared.spans.square[i], mi, nj, e);
    }
    dots[nj][mi][e] *= shared.row.scale[i] * shared.col.scale[j];
    if constexpr (!Shape::volumes) {
      dots[nj][mi][e] += shared.row.bias[i] + shared.col.bias[j];
    }
  });
  if (!mask.all()) {
    Shape::Place::for_each([&](int mi, int nj, int e, int k, int l) {
      const int i = place.row_of(k), j = place.col_of(l);
      if (!mask.takes_part(shared.row, shared.col, i, j) || mask.excluded(shared.row, shared.col, i, j)) {
        dots[nj][mi][e] = -INF;
      }
    });
  }
}

// Statistics of the rows and columns of a warp's part of the tile, with one exponential per pair where it is exact.
template <typename Shape>
__device__ __forceinline__ void reduce(
    const typename Shape::Dots& logits,
    Shared<Shape>& shared,
    const typename Shape::Place& place,
    bool rows,
    bool cols,
    bool totals) {
  using Place = typename Shape::Place;
  float row_max[Place::row_count], col_max[Place::col_count];
#pragma unroll
  for (int k = 0; k < Place::row_count; ++k) {
    row_max[k] = -INF;
  }
#pragma unroll
  for (int l = 0; l < Place::col_count; ++l) {
    col_max[l] = -INF;
  }
  Place::for_each([&](int mi, int nj, int e, int k, int l) {
    row_max[k] = fmaxf(row_max[k], logits[nj][mi][e]);
    col_max[l] = fmaxf(col_max[l], logits[nj][mi][e]);
  });
  const int thread = thread_index(), lane = thread % 32, of_row = Shape::warp_col(thread),
            of_col = Shape::warp_row(thread);
  float high = -INF, low = INF;
#pragma unroll
  for (int k = 0; k < Place::row_count; ++k) {
    row_max[k] = over_cols(row_max[k], Maximum());
    high = fmaxf(high, row_max[k]);
    low = fminf(low, row_max[k] == -INF ? INF : row_max[k]);
    if (lane % 4 == 0) {
      shared.of_rows.maximum[of_row][place.row_of(k)] = row_max[k];
    }
  }
#pragma unroll
  for (int l = 0; l < Place::col_count; ++l) {
    col_max[l] = over_rows(col_max[l], Maximum());
    low = fminf(low, col_max[l] == -INF ? INF : col_max[l]);
    if (lane / 4 == 0) {
      shared.of_cols.maximum[of_col][place.col_of(l)] = col_max[l];
    }
  }
  high = over_warp(high, Maximum());
  low = over_warp(low, Minimum());
  const bool common = rows && cols && high - low <= SPREAD;
  const float shift = shift_of(high);
  if (lane == 0) {
    shared.shift[of_col][of_row] = common ? shift : NAN;
  }
  // a shift for all of the warp's part leaves no maximum in a register
  float row_sum[Place::row_count] = {}, col_sum[Place::col_count] = {};
  if (common) {
    Place::for_each([&](int mi, int nj, int e, int k, int l) {
      const float term = exponential(logits[nj][mi][e] - shift);
      row_sum[k] += term;
      col_sum[l] += term;
    });
  } else {
    Place::for_each([&](int mi, int nj, int e, int k, int l) {
      row_sum[k] += rows ? exponential(logits[nj][mi][e] - shift_of(row_max[k])) : 0.0f;
      col_sum[l] += cols ? exponential(logits[nj][mi][e] - shift_of(col_max[l])) : 0.0f;
    });
  }
#pragma unroll
  for (int k = 0; k < Place::row_count; ++k) {
    row_sum[k] = over_cols(row_sum[k], Add());
    if (lane % 4 == 0) {
      shared.of_rows.sum[of_row][place.row_of(k)] = row_sum[k];
    }
  }
#pragma unroll
  for (int l = 0; l < Place::col_count; ++l) {
    col_sum[l] = over_rows(col_sum[l], Add());
    if (lane / 4 == 0) {
      shared.of_cols.sum[of_col][place.col_of(l)] = col_sum[l];
    }
  }
  if (totals) {
    float row_total[Place::row_count] = {}, col_total[Place::col_count] = {};
    Place::for_each([&](int mi, int nj, int e, int k, int l) {
      const float logit = logits[nj][mi][e] == -INF ? 0.0f : logits[nj][mi][e];
      row_total[k] += logit;
      col_total[l] += logit;
    });
#pragma unroll
    for (int k = 0; k < Place::row_count; ++k) {
      row_total[k] = over_cols(row_total[k], Add());
      if (lane % 4 == 0) {
        shared.of_rows.total[of_row][place.row_of(k)] = row_total[k];
      }
    }
#pragma unroll
    for (int l = 0; l < Place::col_count; ++l) {
      col_total[l] = over_rows(col_total[l], Add());
      if (lane / 4 == 0) {
        shared.of_cols.total[of_col][place.col_of(l)] = col_total[l];
      }
    }
  }
}

__device__ __forceinline__ void write(const Part& part, int64_t index, const Statistics& statistics) {
  part.maximum[index] = statistics.maximum;
  part.sum[index] = statistics.sum;
  if (part.total != nullptr) {
    part.total[index] = statistics.total;
  }
}

__device__ __forceinline__ Statistics read(const Part& part, int64_t index) {
  return {part.maximum[index], part.sum[index], part.total == nullptr ? 0.0f : part.total[index]};
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::threads, sizeof(T) == 2 ? 2 : 1) forward_kernel(
    Problem problem, Part row_part, Part col_part, int rows_per_group, int cols_per_strip, bool aligned) {
  auto& shared = *reinterpret_cast<Shared<Shape>*>(shared_memory());
  const int first_row = blockIdx.x * rows_per_group, last_row = min(first_row + rows_per_group, problem.n);
  const int first_col = blockIdx.y * cols_per_strip, last_col = min(first_col + cols_per_strip, problem.m);
  const bool rows = row_part.maximum != nullptr, cols = col_part.maximum != nullptr;
  const bool totals = Shape::volumes && (row_part.total != nullptr || col_part.total != nullptr);
  const bool mirrored = !Shape::volumes && problem.mirrored;
  // the row and the column of a tile whose statistics a thread folds, and where they are
  const auto has_row = [&](int row) { return rows && row < Shape::rows; };
  const auto has_col = [&](int col) { return cols && col >= 0 && col < Shape::cols; };
  const auto of_strip = [&](int row) { return blockIdx.y * static_cast<int64_t>(problem.n) + row; };
  const auto of_group = [&](int col) { return blockIdx.x * static_cast<int64_t>(problem.m) + col; };
  if (const int own_col = thread_index() - Shape::rows; has_col(own_col)) {
    for (int col = first_col + own_col; col < last_col; col += Shape::cols) {
      write(col_part, of_group(col), {});
    }
  }

  // The next tile of columns with a pair that counts, from `col` on.
  const auto next = [&](int row, int col) {
    if constexpr (!Shape::volumes) {
      while (col < last_col &&
             !Mask(problem, row, col, Shape::rows, Shape::cols).any(problem, Shape::rows, Shape::cols)) {
        col += Shape::cols;
      }
    }
    return col;
  };

  Products<T, Shape> products(problem, shared.stages, aligned);
  typename Shape::Dots dots;
  for (int row = first_row; row < last_row; row += Shape::rows) {
    shared.row.load_rows(problem, row);
    if (const int own_row = thread_index(); has_row(own_row)) {
      shared.statistics[own_row] = {};
    }
    if constexpr (Shape::volumes) {
      shared.spans.load_rows(problem, row);
    }
    int col = next(row, mirrored ? max(first_col, row) : first_col);
    if (col < last_col) {
      products.begin(row, col);
    }
    while (col < last_col) {
      // the tile before is reduced, so that none reads its options any more
      shared.col.load_cols(problem, col);
      if constexpr (Shape::volumes) {
        shared.spans.load_cols(problem, col);
      }
      products.finish(dots);
      const int next_col = next(row, col + Shape::cols);
      if (next_col < last_col) {
        products.begin(row, next_col);
      }
      const Mask mask(problem, row, col, Shape::rows, Shape::cols);
      const auto place = Shape::place(thread_index());
      logits<Shape>(dots, shared, mask, place);
      reduce<Shape>(dots, shared, place, rows, cols, totals);
      __syncthreads();
      const int own_row = thread_index(), own_col = own_row - Shape::rows;
      if (has_row(own_row)) {
        fold(shared.statistics[own_row], shared.of_rows, own_row, totals, [&](int part) {
          return shared.shift[own_row / Shape::warp_rows][part];
        });
      }
      // in self-similarity the tiles on the diagonal have both sides of their pairs
      const bool mirrors = !mirrored || row + Shape::rows <= col;
      if (has_col(own_col) && mirrors && col + own_col < last_col) {
        Statistics of_col = read(col_part, of_group(col + own_col));
        fold(of_col, shared.of_cols, own_col, totals, [&](int part) {
          return shared.shift[part][own_col / Shape::warp_cols];
        });
        write(col_part, of_group(col + own_col), of_col);
      }
      col = next_col;
    }
    if (const int own_row = thread_index(); has_row(own_row) && row + own_row < last_row) {
      write(row_part, of_strip(row + own_row), shared.statistics[own_row]);
    }
    __syncthreads();  // before the options of the next rows
  }
}

}  // namespace

Tiling tiling(int members) {
  Tiling found{};
  for_members(members, [&](auto shape) -> const char* {
    found = {shape.rows, shape.cols};
    return nullptr;
  });
  return found;
}

const char* forward(
    const Problem& problem,
    const Part& row,
    const Part& col,
    int rows_per_group,
    int cols_per_strip,
    cudaStream_t stream) {
  const auto groups = (problem.n + static_cast<int64_t>(rows_per_group) - 1) / rows_per_group;
  const auto strips = (problem.m + static_cast<int64_t>(cols_per_strip) - 1) / cols_per_strip;
  const dim3 grid(static_cast<unsigned>(groups), static_cast<unsigned>(strips));
  return for_dtype(problem.dtype, [&](auto element) {
    return for_members(problem.members, [&](auto shape) {
      using Shape = decltype(shape);
      return launch(
          forward_kernel<decltype(element), Shape>,
          grid,
          Shape::threads,
          sizeof(Shared<Shape>),
          stream,
          problem,
          row,
          col,
          rows_per_group,
          cols_per_strip,
          is_aligned(problem));
    });
  });
}

}  // namespace contrastive_ops::cuda
