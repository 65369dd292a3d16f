// What a reduction makes of rows and columns, in one visit of every tile.
//
//   a block has a group of rows and a strip of columns; for each tile of rows, for each tile of columns:
//       s = logits of the tile, and z where there is a second form
//       each warp: what the reduction makes of the rows and columns of its part, to shared memory
//       one thread a row: fold it into the statistics of the row, in shared memory
//       one thread a column: fold it into the statistics of the column, in memory that no other thread touches
//
// The copies for the next tile are under way while this one's logits are reduced. No atomics: fixed order, same bits.
#include "reductions.cuh"

namespace contrastive_ops::cuda {
namespace {

template <typename Reduction>
struct Shared {
  using Shape = typename Reduction::Shape;
  alignas(128) unsigned char stages[Shape::stages * Shape::stage_bytes];
  Options<Shape::rows> row;
  Options<Shape::cols> col;
  Spans<Shape> spans;
  SecondOptions<Shape, Reduction::with> second;
  typename Reduction::Reduced reduced;
  typename Reduction::Statistics statistics[Shape::rows];  // each row's own thread's
};

// What is reduced in place of the products of the tile: the logits, or a function of them, and `nothing` where a pair
// takes no part.
template <typename T, typename Reduction>
__device__ __forceinline__ void evaluate(
    typename Reduction::Shape::Dots& dots,
    SecondValues<typename Reduction::Shape, Reduction::with>& second,
    const Shared<Reduction>& shared,
    const Pairs<T, Reduction>& pairs,
    const Mask& mask,
    const typename Reduction::Shape::Place& place) {
  using Shape = typename Reduction::Shape;
  Shape::Place::for_each([&](int mi, int nj, int e, int k, int l) {
    const int i = place.row_of(k), j = place.col_of(l);
    if constexpr (Shape::volumes) {
      coordinates<Shape>(dots, shared.spans, mi, nj, e, j);
      dots[nj][mi][e] = minus_distance<Shape>(dots, shared.spans.square[i], mi, nj, e);
    }
    dots[nj][mi][e] = logit_of_pair<Shape::volumes>(dots[nj][mi][e], shared.row, shared.col, i, j);
    if constexpr (Reduction::with == With::teacher) {
      float& teacher = second.dots[nj][mi][e];
      teacher = pairs.has_second ? logit_of_pair<false>(teacher, shared.second.row, shared.second.col, i, j)
                                 : dots[nj][mi][e];
    }
  });
  const auto leave_out = [&](int mi, int nj, int e) {
    dots[nj][mi][e] = Reduction::nothing;
    if constexpr (Reduction::with == With::teacher) {
      second.dots[nj][mi][e] = Reduction::nothing;
    }
  };
  if constexpr (Reduction::with == With::nothing) {
    if (!mask.all()) {
      Shape::Place::for_each([&](int mi, int nj, int e, int k, int l) {
        const int i = place.row_of(k), j = place.col_of(l);
        if (!mask.takes_part(shared.row, shared.col, i, j) || mask.excluded(shared.row, shared.col, i, j)) {
          leave_out(mi, nj, e);
        }
      });
    }
  } else {
    pairs.choose(second, shared.second, shared.row, shared.col, mask, [&](int mi, int nj, int e, int, int) {
      return dots[nj][mi][e];
    });
    Reduction::evaluate(pairs.problem, dots);
    Shape::Place::for_each([&](int mi, int nj, int e, int k, int l) {
      if (!second.chosen.has(k, l)) {
        leave_out(mi, nj, e);
      }
    });
  }
}

template <typename T, typename Reduction>
__global__ void __launch_bounds__(Reduction::Shape::threads, sizeof(T) == 2 ? 2 : 1) forward_kernel(
    Problem problem, Part row_part, Part col_part, int rows_per_group, int cols_per_strip, bool aligned) {
  using Shape = typename Reduction::Shape;
  auto& shared = *reinterpret_cast<Shared<Reduction>*>(shared_memory());
  const int first_row = blockIdx.x * rows_per_group, last_row = min(first_row + rows_per_group, problem.n);
  const int first_col = blockIdx.y * cols_per_strip, last_col = min(first_col + cols_per_strip, problem.m);
  const bool rows = Reduction::asked(row_part), cols = Reduction::asked(col_part);
  const bool more = Reduction::more(row_part, col_part);
  const bool mirrored = !Shape::volumes && problem.mirrored;
  // the row and the column of a tile whose statistics a thread folds, and where they are
  const auto has_row = [&](int row) { return rows && row < Shape::rows; };
  const auto has_col = [&](int col) { return cols && col >= 0 && col < Shape::cols; };
  const auto of_strip = [&](int row) { return blockIdx.y * static_cast<int64_t>(problem.n) + row; };
  const auto of_group = [&](int col) { return blockIdx.x * static_cast<int64_t>(problem.m) + col; };
  if (const int own_col = thread_index() - Shape::rows; has_col(own_col)) {
    for (int col = first_col + own_col; col < last_col; col += Shape::cols) {
      Reduction::write(col_part, of_group(col), {});
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

  Pairs<T, Reduction> pairs(problem, shared.stages, aligned);
  typename Shape::Dots dots;
  SecondValues<Shape, Reduction::with> second;
  for (int row = first_row; row < last_row; row += Shape::rows) {
    shared.row.load_rows(problem, row);
    shared.second.load_rows(problem, row);
    if (const int own_row = thread_index(); has_row(own_row)) {
      shared.statistics[own_row] = {};
    }
    if constexpr (Shape::volumes) {
      shared.spans.load_rows(problem, row);
    }
    int col = next(row, mirrored ? max(first_col, row) : first_col);
    if (col < last_col) {
      pairs.begin(row, col);
    }
    while (col < last_col) {
      // the tile before is reduced, so that none reads its options any more
      shared.col.load_cols(problem, col);
      shared.second.load_cols(problem, col);
      if constexpr (Shape::volumes) {
        shared.spans.load_cols(problem, col);
      }
      pairs.finish(dots, second, shared.second, row, col);
      const int next_col = next(row, col + Shape::cols);
      if (next_col < last_col) {
        pairs.begin(row, next_col);
      }
      const Mask mask(problem, row, col, Shape::rows, Shape::cols);
      const auto place = Shape::place(thread_index());
      evaluate<T, Reduction>(dots, second, shared, pairs, mask, place);
      Reduction::reduce(shared.reduced, dots, second, place, rows, cols, more);
      __syncthreads();
      const int own_row = thread_index(), own_col = own_row - Shape::rows;
      if (has_row(own_row)) {
        shared.reduced.fold_row(shared.statistics[own_row], own_row, more);
      }
      // in self-similarity the tiles on the diagonal have both sides of their pairs
      const bool mirrors = !mirrored || row + Shape::rows <= col;
      if (has_col(own_col) && mirrors && col + own_col < last_col) {
        auto of_col = Reduction::read(col_part, of_group(col + own_col));
        shared.reduced.fold_col(of_col, own_col, more);
        Reduction::write(col_part, of_group(col + own_col), of_col);
      }
      col = next_col;
    }
    if (const int own_row = thread_index(); has_row(own_row) && row + own_row < last_row) {
      Reduction::write(row_part, of_strip(row + own_row), shared.statistics[own_row]);
    }
    __syncthreads();  // before the options of the next rows
  }
}

}  // namespace

Tiling tiling(Reduction reduction, int members) {
  Tiling found{};
  Problem problem{};
  problem.reduction = reduction;
  problem.members = members;
  for_reduction(problem, [&](auto chosen) -> const char* {
    using Shape = typename decltype(chosen)::Shape;
    found = {Shape::rows, Shape::cols};
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
    return for_reduction(problem, [&](auto reduction) {
      using Reduction = decltype(reduction);
      return launch(
          forward_kernel<decltype(element), Reduction>,
          grid,
          Reduction::Shape::threads,
          sizeof(Shared<Reduction>),
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
