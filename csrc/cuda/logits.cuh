// Logits of a tile, in place of its products: what the options say of its rows and columns, distances, a second form,
// and which pairs take part.
#pragma once

#include "tile.cuh"

namespace contrastive_ops::cuda {

// Calls set(i, index, inside) for each of a tile's rows or columns, `index` of the plane.
template <int SIZE, typename Set>
__device__ __forceinline__ void for_side(int first, int last, Set set) {
  for (int i = thread_index(); i < SIZE; i += blockDim.x) {
    const int index = first + i;
    set(i, index, index < last);
  }
}

// Scales and biases of the rows or columns of a tile, in shared memory. What was not given changes nothing.
template <int SIZE>
struct Scales {
  float scale[SIZE];
  float bias[SIZE];

  __device__ __forceinline__ void set(int i, int index, bool inside, const float* scales, const float* biases) {
    scale[i] = inside && scales != nullptr ? scales[index] : 1.0f;
    bias[i] = inside && biases != nullptr ? biases[index] : 0.0f;
  }
};

// All that the options say of them.
template <int SIZE>
struct Options : Scales<SIZE> {
  int exclude[SIZE];
  int ids[SIZE];

  __device__ void load(
      const float* scales, const float* biases, const int* excludes, const int* all_ids, int first, int last) {
    for_side<SIZE>(first, last, [&](int i, int index, bool inside) {
      this->set(i, index, inside, scales, biases);
      exclude[i] = inside && excludes != nullptr ? excludes[index] : -1;
      ids[i] = inside && all_ids != nullptr ? all_ids[index] : 0;
    });
  }

  __device__ void load_rows(const Problem& problem, int first) {
    const Vectors& v = problem.vectors;
    load(v.row_scale, v.row_bias, v.row_exclude, v.row_ids, first, problem.n);
  }

  __device__ void load_cols(const Problem& problem, int first) {
    const Vectors& v = problem.vectors;
    load(v.col_scale, v.col_bias, v.col_exclude, v.col_ids, first, problem.m);
  }
};

// What distances need of a tile, in shared memory.
template <typename Shape>
struct Spans {
  static constexpr int entries = Shape::members * (Shape::members + 1) / 2;
  float inverse[entries][Shape::cols];
  float square[Shape::rows];

  __device__ void load_rows(const Problem& problem, int first) {
    for (int i = thread_index(); i < Shape::rows; i += blockDim.x) {
      square[i] = first + i < problem.n ? problem.span.square[first + i] : 0.0f;
    }
  }

  __device__ void load_cols(const Problem& problem, int first) {
    for (int i = thread_index(); i < entries * Shape::cols; i += blockDim.x) {
      const int entry = i / Shape::cols, col = first + i % Shape::cols;
      inverse[entry][i % Shape::cols] =
          col < problem.m ? problem.span.inverse[entry * static_cast<int64_t>(problem.m) + col] : 0.0f;
    }
  }
};

// Makes the products of an element with the members of its column the coordinates of x_i in their span, L^-1 products.
template <typename Shape>
__device__ __forceinline__ void coordinates(
    typename Shape::Dots& dots, const Spans<Shape>& spans, int mi, int nj, int e, int col) {
#pragma unroll
  for (int t = Shape::members - 1; t >= 0; --t) {  // the last first: each takes the products of those before it
    float coordinate = 0.0f;
#pragma unroll
    for (int s = 0; s <= t; ++s) {
      coordinate += spans.inverse[t * (t + 1) / 2 + s][col] * dots[s * Shape::NJ + nj][mi][e];
    }
    dots[t * Shape::NJ + nj][mi][e] = coordinate;
  }
}

// Minus the distance of x_i, of squared length `square`, from the span in which it has these coordinates.
template <typename Shape>
__device__ __forceinline__ float minus_distance(const typename Shape::Dots& dots, float square, int mi, int nj, int e) {
  float outside = square;
#pragma unroll
  for (int t = 0; t < Shape::members; ++t) {
    const float coordinate = dots[t * Shape::NJ + nj][mi][e];
    outside -= coordinate * coordinate;
  }
  return -sqrtf(outside < 0.0f ? 0.0f : outside);  // fmaxf would turn NaN into 0
}

// Which pairs of the tile at (row, col) take part. Most tiles lie inside, with all pairs but those that ids leave out.
struct Mask {
  int row, col, n, m;
  bool inside, excludes, ids, equal;

  // Every warp finds out by itself. `rows` and `cols` are the size of the tile.
  __device__ Mask(const Problem& problem, int row, int col, int rows, int cols)
      : row(row), col(col), n(problem.n), m(problem.m), equal(problem.equal) {
    const Vectors& v = problem.vectors;
    inside = row + rows <= n && col + cols <= m;
    ids = v.row_ids != nullptr;
    excludes = names(v.row_exclude, row, min(row + rows, n), col, col + cols) ||
               names(v.col_exclude, col, min(col + cols, m), row, row + rows);
  }

  // Whether any index of a range lies in [low, high).
  static __device__ bool names(const int* index, int first, int last, int low, int high) {
    if (index == nullptr) {
      return false;
    }
    bool any = false;
    for (int i = first + thread_index() % 32; i < last; i += 32) {
      any |= index[i] >= low && index[i] < high;
    }
    return __any_sync(ALL_LANES, any);
  }

  // Whether any pair counts. If only equal ids take part, ids that are sorted rule most tiles out.
  __device__ bool any(const Problem& problem, int rows, int cols) const {
    if (!ids || !equal || excludes) {
      return true;
    }
    int row_low, row_high, col_low, col_high;
    range(problem.vectors.row_ids, row, min(row + rows, n), row_low, row_high);
    range(problem.vectors.col_ids, col, min(col + cols, m), col_low, col_high);
    return row_low <= col_high && col_low <= row_high;
  }

  static __device__ void range(const int* ids, int first, int last, int& low, int& high) {
    low = INT32_MAX;
    high = -1;
    for (int i = first + thread_index() % 32; i < last; i += 32) {
      low = min(low, ids[i]);
      high = max(high, ids[i]);
    }
    low = __reduce_min_sync(ALL_LANES, low);
    high = __reduce_max_sync(ALL_LANES, high);
  }

  __device__ bool all() const {
    return inside && !excludes && !ids;
  }

  // Whether row i and column j of the tile are a pair that counts, if it is not left out by index.
  template <int ROWS, int COLS>
  __device__ __forceinline__ bool takes_part(const Options<ROWS>& rows, const Options<COLS>& cols, int i, int j) const {
    return all() || (row + i < n && col + j < m && (!ids || (rows.ids[i] == cols.ids[j]) == equal));
  }

  template <int ROWS, int COLS>
  __device__ __forceinline__ bool excluded(const Options<ROWS>& rows, const Options<COLS>& cols, int i, int j) const {
    return excludes && (excluded_by_row(rows, i, j) || excluded_by_col(cols, i, j));
  }

  template <int ROWS>
  __device__ __forceinline__ bool excluded_by_row(const Options<ROWS>& rows, int i, int j) const {
    return rows.exclude[i] == col + j;
  }

  template <int COLS>
  __device__ __forceinline__ bool excluded_by_col(const Options<COLS>& cols, int i, int j) const {
    return cols.exclude[j] == row + i;
  }
};

// What a reduction has beside the logits.
enum class With { nothing, guide, teacher };

// What a second form has of a tile, in shared memory.
template <typename Shape, With WITH>
struct SecondOptions {
  __device__ void load_rows(const Problem&, int) {}
  __device__ void load_cols(const Problem&, int) {}
};

template <typename Shape>
struct SecondOptions<Shape, With::guide> {
  float row_ceiling[Shape::rows];  // inf where none is given: nothing is above it
  float col_ceiling[Shape::cols];

  __device__ void load_rows(const Problem& problem, int first) {
    load<Shape::rows>(row_ceiling, problem.second.row_ceiling, first, problem.n);
  }

  __device__ void load_cols(const Problem& problem, int first) {
    load<Shape::cols>(col_ceiling, problem.second.col_ceiling, first, problem.m);
  }

  template <int SIZE>
  static __device__ void load(float (&ceiling)[SIZE], const float* ceilings, int first, int last) {
    for_side<SIZE>(first, last, [&](int i, int index, bool inside) {
      ceiling[i] = inside && ceilings != nullptr ? ceilings[index] : INF;
    });
  }
};

template <typename Shape>
struct SecondOptions<Shape, With::teacher> {
  Scales<Shape::rows> row;
  Scales<Shape::cols> col;

  __device__ void load_rows(const Problem& problem, int first) {
    for_side<Shape::rows>(first, problem.n, [&](int i, int index, bool inside) {
      row.set(i, index, inside, problem.second.row_scale, problem.second.row_bias);
    });
  }

  __device__ void load_cols(const Problem& problem, int first) {
    for_side<Shape::cols>(first, problem.m, [&](int i, int index, bool inside) {
      col.set(i, index, inside, problem.second.col_scale, problem.second.col_bias);
    });
  }
};

// Which of a thread's pairs take part, a bit for each: all at first.
template <typename Place>
struct Chosen {
  static constexpr int words = (Place::row_count * Place::col_count + 31) / 32;
  uint32_t bits[words];

  __device__ __forceinline__ Chosen() {
#pragma unroll
    for (uint32_t& word : bits) {
      word = ~0u;
    }
  }

  // Of these, those for which keeps(mi, nj, e, k, l), as in Place::for_each.
  template <typename Keeps>
  __device__ __forceinline__ void keep(Keeps keeps) {
    Place::for_each([&](int mi, int nj, int e, int k, int l) {
      const int bit = k * Place::col_count + l;
      bits[bit / 32] &= ~(static_cast<uint32_t>(!keeps(mi, nj, e, k, l)) << bit % 32);
    });
  }

  __device__ __forceinline__ bool has(int k, int l) const {
    const int bit = k * Place::col_count + l;
    return bits[bit / 32] >> bit % 32 & 1;
  }
};

// What a thread keeps of its pairs beside the logits.
template <typename Shape, With WITH>
struct SecondValues {};

template <typename Shape>
struct SecondValues<Shape, With::guide> {
  Chosen<typename Shape::Place> chosen;
};

template <typename Shape>
struct SecondValues<Shape, With::teacher> {
  Chosen<typename Shape::Place> chosen;
  typename Shape::Dots dots;  // and then the logits
};

// The products of both forms of a tile's pairs, the second form's before the logits', and which of the pairs take part.
template <typename T, typename Reduction>
struct Pairs {
  using Shape = typename Reduction::Shape;
  static constexpr With with = Reduction::with;
  using Dots = typename Shape::Dots;
  using Values = SecondValues<Shape, with>;
  using Given = SecondOptions<Shape, with>;

  const Problem& problem;
  Products<T, Shape> logits, second;
  bool has_second;  // the second form, or else it is the logit

  __device__ Pairs(const Problem& problem, unsigned char* stages, bool aligned)
      : problem(problem),
        logits(problem, {problem.x, problem.y, problem.features}, stages, aligned),
        second(problem, problem.second.form, stages, aligned),
        has_second(with != With::nothing && problem.second.form.x != nullptr) {}

  __device__ __forceinline__ void begin(int row, int col) {
    if (has_second) {
      second.begin(row, col);
    } else {
      logits.begin(row, col);
    }
  }

  // Of the tile at (row, col), which `begin` began.
  __device__ __forceinline__ void finish(Dots& dots, Values& values, const Given& given, int row, int col) {
    if constexpr (with != With::nothing) {
      values.chosen = {};
    }
    if constexpr (with == With::guide) {
      if (has_second) {
        second.finish(dots);
        logits.begin(row, col);
        compare(values, given, [&](int mi, int nj, int e, int, int) { return dots[nj][mi][e]; });
      }
    } else if constexpr (with == With::teacher) {
      if (has_second) {
        second.finish(values.dots);
        logits.begin(row, col);
      }
    }
    logits.finish(dots);
  }

  // Leaves out what the options do; and by their logits, where there is no other guide. `logit_of` is called as in
  // Place::for_each, but with the row and column of the tile.
  template <typename Logit>
  __device__ __forceinline__ void choose(
      Values& values,
      const Given& given,
      const Options<Shape::rows>& rows,
      const Options<Shape::cols>& cols,
      const Mask& mask,
      Logit logit_of) const {
    if constexpr (with == With::guide) {
      const bool guided = problem.second.row_ceiling != nullptr || problem.second.col_ceiling != nullptr;
      if (guided && !has_second) {
        compare(values, given, logit_of);
      }
    }
    if constexpr (with != With::nothing) {
      if (!mask.all()) {
        keep(values, [&](int, int, int, int i, int j) {
          return mask.takes_part(rows, cols, i, j) && !mask.excluded(rows, cols, i, j);
        });
      }
    }
  }

 private:
  template <typename Similarity>
  __device__ __forceinline__ void compare(Values& values, const Given& given, Similarity similarity_of) const {
    keep(values, [&](int mi, int nj, int e, int i, int j) {
      const float similarity = similarity_of(mi, nj, e, i, j);
      const bool is_above = similarity > given.row_ceiling[i] || similarity > given.col_ceiling[j];
      return is_above == problem.second.above;
    });
  }

  template <typename Keeps>
  static __device__ __forceinline__ void keep(Values& values, Keeps keeps) {
    auto place = Shape::place(thread_index());
    values.chosen.keep([&](int mi, int nj, int e, int k, int l) {
      if (l == 0) {  // so that what the columns have is read again for each row, and takes no registers
        place = Shape::place(thread_index());
      }
      return keeps(mi, nj, e, place.row_of(k), place.col_of(l));
    });
  }
};

// s_ij of a pair of the tile, whether it takes part or not. Volumes have no biases.
template <bool VOLUMES, int ROWS, int COLS>
__device__ __forceinline__ float logit_of_pair(
    float pair, const Scales<ROWS>& rows, const Scales<COLS>& cols, int i, int j) {
  float logit = pair * (rows.scale[i] * cols.scale[j]);
  if constexpr (!VOLUMES) {
    logit += rows.bias[i] + cols.bias[j];
  }
  return logit;
}

// What to subtract before exp: an empty set (-inf) is shifted by 0, as (-inf) - (-inf) would be NaN.
__device__ __forceinline__ float shift_of(float maximum) {
  return maximum == -INF ? 0.0f : maximum;
}

}  // namespace contrastive_ops::cuda
