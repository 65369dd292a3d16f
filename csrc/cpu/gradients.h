// The gradients of one form, from the coefficients of its pairs: dX += C Y and dY += C^T X block by block, and the sums
// that are the gradients of scales and biases.
#pragma once

#include "block.h"
#include "memory.h"
#include "pairs.h"
#include "problem.h"
#include "ranges.h"
#include "tasks.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/irange.h>

namespace contrastive_ops {

template <typename Products>
class FormGradients {
 public:
  using T = typename Products::Statistic;
  using Operand = typename Products::Operand;

  // Blocks are at most as large as these two.
  FormGradients(const Pairs<Products>& pairs, Needs needs, int64_t block_rows, int64_t block_cols)
      : pairs_(pairs),
        needs_(needs),
        mirrored_(pairs.mirrored()),
        to_y_(mirrored_ ? needs.x : needs.y),
        sums_(needs.row_scale || needs.col_scale || needs.row_bias || needs.col_bias),
        padded_features_(pairs.feature_panels() * pairs.products().panel()),
        block_rows_(round_up(std::min(block_rows, pairs.n()), kTile)),
        block_cols_(round_up(std::min(block_cols, pairs.m()), kTile)),
        grad_x_(features_gradient(needs.x ? pairs.n() : 0, 1)),
        grad_y_(mirrored_ ? grad_x_ : features_gradient(to_y_ ? pairs.m() : 0, pairs.members())),
        row_scale_sum_(full(sums_ ? pairs.n() : 0, T(0))),
        row_bias_sum_(full(sums_ ? pairs.n() : 0, T(0))),
        col_scale_sum_(mirrored_ ? row_scale_sum_ : full(sums_ ? pairs.m() : 0, T(0))),
        col_bias_sum_(mirrored_ ? row_bias_sum_ : full(sums_ ? pairs.m() : 0, T(0))),
        square_sum_(full(pairs.of_spans() ? pairs.n() : 0, T(0))),
        coefficients_(empty_for_reuse(
            {(pairs.of_spans() ? 2 * pairs.members() : 1) * block_rows_ * block_cols_},
            c10::CppTypeToScalarType<T>::value)),
        partials_(2, sums_, sums_),
        square_partials_(1, pairs.of_spans(), false) {}

  Use use(bool dots) const {
    return {dots, to_y_, needs_.x};
  }

  void begin(const Block& block) {
    partials_.begin(block);
    square_partials_.begin(block);
  }

  // Where the sums of a tile go.
  CoefficientSums<T> sums(int64_t tile) {
    return {
        {partials_.rows(tile, 0), partials_.rows(tile, 1)},
        {partials_.cols(tile, 0), partials_.cols(tile, 1)},
    };
  }

  // Where the coefficients of a tile go: of the dot products, or with tuples of the products for x with each vector and
  // then of those for y.
  T* place(int64_t operand, int64_t tile) const {
    return values_of<T>(coefficients_, operand * block_rows_ * block_cols_ + tile * kTileSize);
  }

  // With tuples: from the gradients of the pairs of a tile to the coefficients of all products.
  void spread(Range rows, Range cols, int64_t tile, const T* dots, const T* pairs, const T* gradients) {
    SpanCoefficients<T> operands{{}, {}, square_partials_.rows(tile, 0)};
    for (const auto t : c10::irange(pairs_.members())) {
      operands.of_x[t] = place(of_x(t), tile);
      operands.of_y[t] = place(of_y(t), tile);
    }
    pairs_.products().kernels().spread(pairs_.span_tile(rows, cols, dots), pairs, gradients, operands);
  }

  // Adds what the coefficients of a block give; `work` is what made them.
  void end(const Block& block, const Packed& x, const std::vector<Packed>& y, int64_t work) {
    const int64_t x_tasks = needs_.x ? block.rows.tiles() : 0;
    const int64_t y_tasks = to_y_ && !block.diagonal() ? block.cols.tiles() * pairs_.members() : 0;
    const auto new_scratch = [&] { return StripScratch(std::max(block_rows_, block_cols_)); };
    // the first block of a strip of rows or columns overwrites, the others add
    const bool x_started = block.cols.begin > 0 || (mirrored_ && block.rows.begin > 0);
    const bool y_started = block.rows.begin > 0;
    for_each_task(x_tasks + y_tasks, 2 * work, new_scratch, [&](int64_t task, const StripScratch& scratch) {
      if (task < x_tasks) {
        for (const auto t : c10::irange(pairs_.members())) {
          multiply_strip(
              block.rows.tile(task),
              block.cols,
              [&](int64_t c) { return tile_for_x(block, t, task, c); },
              y[t],
              values_of<T>(grad_x_, 0),
              padded_features_,
              x_started || t > 0,
              scratch);
        }
      } else {
        const int64_t c = (task - x_tasks) / pairs_.members();
        const int64_t t = (task - x_tasks) % pairs_.members();
        multiply_strip(
            block.cols.tile(c),
            block.rows,
            [&](int64_t r) { return tile_for_y(block, t, r, c); },
            x,
            values_of<T>(grad_y_, t * padded_features_),
            grad_y_.stride(0),
            y_started,
            scratch);
      }
    });
    block.for_each_contribution(
        [&](Range rows, int64_t tile) {
          add(row_scale_sum_, rows, partials_.rows(tile, 0));
          add(row_bias_sum_, rows, partials_.rows(tile, 1));
          add(square_sum_, rows, square_partials_.rows(tile, 0));
        },
        [&](Range cols, int64_t tile) {
          add(col_scale_sum_, cols, partials_.cols(tile, 0));
          add(col_bias_sum_, cols, partials_.cols(tile, 1));
        });
  }

  Gradients result() const {
    const at::Tensor& x = pairs_.x();
    const at::Tensor& y = pairs_.y();
    const auto unpadded = [&](const at::Tensor& grad) { return grad.narrow(2, 0, pairs_.features()); };
    const auto none = [](const at::Tensor& like) { return at::empty({0}, like.options()); };
    const auto vector_of = [&](const at::Tensor& sum, bool need) { return need ? sum : none(sum); };
    if (pairs_.of_spans() && needs_.x) {
      grad_x_.select(1, 0)
          .narrow(1, 0, pairs_.features())
          .addcmul_(x.to(grad_x_.scalar_type()), square_sum_.unsqueeze(1), -1);
    }
    return {
        needs_.x ? unpadded(grad_x_).select(1, 0).contiguous().to(x.scalar_type()) : none(x),
        !needs_.y           ? none(y)
        : pairs_.of_spans() ? unpadded(grad_y_).contiguous()
                            : unpadded(grad_y_).select(1, 0).contiguous().to(y.scalar_type()),
        vector_of(row_scale_sum_, needs_.row_scale),
        vector_of(col_scale_sum_, needs_.col_scale),
        vector_of(row_bias_sum_, needs_.row_bias),
        vector_of(col_bias_sum_, needs_.col_bias)};
  }

 private:
  // What one thread makes strips of coefficients in, as long as a block is.
  struct StripScratch {
    explicit StripScratch(int64_t length) : strip(Pairs<Products>::operands(kTile * length)) {}
    typename Products::Session session;
    at::Tensor strip;
  };

  // A tile of coefficients, or its transpose, of a strip; null where there is none.
  struct StripTile {
    const T* values;
    int64_t rows;
    bool transposed;
  };

  // Without blocks there is nothing to overwrite them.
  at::Tensor features_gradient(int64_t rows, int64_t members) const {
    const int64_t sizes[] = {rows, members, padded_features_};
    constexpr c10::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
    return pairs_.n() * pairs_.m() == 0 ? at::zeros(sizes, dtype) : empty_for_reuse(sizes, dtype);
  }

  static int64_t of_x(int64_t t) {
    return t;
  }
  int64_t of_y(int64_t t) const {
    return pairs_.of_spans() ? pairs_.members() + t : t;
  }

  // Tile (r, c) of the coefficients for x; within a diagonal block it may be the mirror image of (c, r).
  StripTile tile_for_x(const Block& block, int64_t t, int64_t r, int64_t c) const {
    const int64_t tile_cols = block.cols.tiles();
    if (block.part[r * tile_cols + c] != Part::nothing) {
      return {place(of_x(t), r * tile_cols + c), block.rows.tile(r).size(), false};
    }
    const bool mirror = block.diagonal() && block.part[c * tile_cols + r] == Part::both;
    return {mirror ? place(of_x(t), c * tile_cols + r) : nullptr, block.rows.tile(c).size(), true};
  }
  StripTile tile_for_y(const Block& block, int64_t t, int64_t r, int64_t c) const {
    const int64_t tile = r * block.cols.tiles() + c;
    const bool present = block.part[tile] != Part::nothing;
    return {present ? place(of_y(t), tile) : nullptr, block.rows.tile(r).size(), true};
  }

  // 128 rows of a gradient: the tiles (tile_at) along a depth times the feature panels, over runs of present tiles.
  template <typename TileAt>
  void multiply_strip(
      Range range,
      Range depth_range,
      const TileAt& tile_at,
      const Packed& other,
      T* grad,
      int64_t ld,
      bool accumulate,
      const StripScratch& scratch) const {
    const Products& products = pairs_.products();
    const int64_t panel = products.panel();
    const int64_t depth_tiles = depth_range.tiles();
    const int64_t panel_size = products.depth(depth_range.size()) * panel;
    const Operand* panels = Pairs<Products>::packed_of(other.feature_panels);
    Operand* strip = Pairs<Products>::operands_of(scratch.strip);
    T* target = grad + range.begin * ld;
    for (int64_t begin = 0, end = 0; begin < depth_tiles; begin = end + 1) {
      for (end = begin; end < depth_tiles; ++end) {
        const StripTile tile = tile_at(end);
        if (tile.values == nullptr) {
          break;
        }
        products.pack_tile(tile.rows, tile.values, tile.transposed, strip + end * kTileSize);
      }
      const int64_t first = begin * kTile;
      const int64_t depth = std::min(end * kTile, depth_range.size()) - first;
      if (depth <= 0) {
        continue;
      }
      for (int64_t p = 0; p < pairs_.feature_panels(); ++p) {
        products.multiply_strip(
            range.size(),
            depth,
            strip + begin * kTileSize,
            panels + p * panel_size + first * panel,
            target + p * panel,
            ld,
            accumulate);
      }
      accumulate = true;
    }
    if (!accumulate) {
      for (int64_t i = 0; i < range.size(); ++i) {
        std::fill_n(target + i * ld, padded_features_, T(0));
      }
    }
  }

  static void add(const at::Tensor& sum, Range range, const T* part) {
    T* of_range = values_of<T>(sum, range.begin);
    for (int64_t i = 0; of_range != nullptr && i < range.size(); ++i) {
      of_range[i] += part[i];
    }
  }

  const Pairs<Products>& pairs_;
  Needs needs_;
  bool mirrored_;
  bool to_y_;
  bool sums_;
  int64_t padded_features_;
  int64_t block_rows_;
  int64_t block_cols_;
  at::Tensor grad_x_;
  at::Tensor grad_y_;
  at::Tensor row_scale_sum_;
  at::Tensor row_bias_sum_;
  at::Tensor col_scale_sum_;
  at::Tensor col_bias_sum_;
  at::Tensor square_sum_;
  at::Tensor coefficients_;  // of a block, rows of tiles
  Partials<T> partials_;     // for scale, then for bias
  Partials<T> square_partials_;
};

}  // namespace contrastive_ops
