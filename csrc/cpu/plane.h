// The walk over the N x M plane of pairs, for any reduction.
//
//   for each block of the plane, 1024 x 1024, with tuples 512 x 512, or longer where the plane is thin:
//     pack the rows of x and y                                              (bounded, whatever N and M are)
//     for each tile of the block, 128 x 128, in parallel:
//       dots = X Y^T;  s = logits of dots, -inf where a pair does not take part
//       forward:   what the reduction folds of the tile                     -> its partial results
//       backward:  dL/ds, the gradient of an excluded pair's own logit in its place, times the scales
//                                                                           -> coefficients, in a workspace
//     forward:     fold the partial results of the block, in the order of the tiles
//     backward:    dX += C Y and dY += C^T X over the whole block, in parallel over rows and columns
//
// Backward computes the dots again, except for those of the first tiles, which forward keeps within 64 MB: a problem
// that is small enough to hold its matrix does the work of the dense loss, and no more. Every sum is taken in an order
// that depends on the shapes alone: results are bitwise equal for any number of threads. In self-similarity (no y)
// tiles below the diagonal are left out; a tile above it also stands for its mirror image.
//
// A second form has dots of its own in each tile: a guide, which masks read, or a teacher, whose logits the reduction
// sees beside those of the pairs.
//
// A reduction has in forward, and in backward the last of them:
//
//   void begin(const Block&)                              room for the results of the tiles of a block
//   void reduce(int64_t tile, const TileAt<T>&)           in parallel
//   void end(const Block&)                                fold them
//   void coefficients(const TileAt<T>&, const Places<T>& pairs, const Places<T>& teacher)
#pragma once

#include "block.h"
#include "gradients.h"
#include "masks.h"
#include "memory.h"
#include "pairs.h"
#include "problem.h"
#include "tasks.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <c10/util/irange.h>

#include <limits>
#include <optional>
#include <utility>
#include <vector>

namespace contrastive_ops {

constexpr int64_t kBlock = 1024;
constexpr int64_t kSpanBlock = 512;  // with tuples, whose coefficients take 2 P places for each pair
// Bound on the dots that are kept from forward to backward, whatever N and M are.
constexpr int64_t kKeptDotsBytes = int64_t(64) << 20;

// A tile as a reduction sees it.
template <typename T>
struct TileAt {
  Range rows;
  Range cols;
  bool to_cols;       // it contributes to its columns
  Tile<T> pairs;      // logits are stored where a pair does not take part
  Tile<T> teacher;    // only where there is one
  T* pair_logits;     // room for the logits, where they are not stored yet
  T* teacher_logits;  // likewise
  T* spare;           // a tile more, where there is a teacher
};

// Where the coefficients of a tile and their sums go; null for a form without gradients. The coefficients of the pairs
// may be where their logits are.
template <typename T>
struct Places {
  T* coefficients = nullptr;
  CoefficientSums<T> sums{};
};

template <typename Products>
class Plane {
 public:
  using T = typename Products::Statistic;

  explicit Plane(const Problem& problem)
      : pairs_(problem.pairs),
        rows_(problem.rows),
        cols_(problem.cols),
        mirrored_(pairs_.mirrored()),
        n_(pairs_.n()),
        m_(pairs_.m()),
        row_block_(block_size(m_)),
        col_block_(block_size(n_)),
        masks_(problem, n_, m_),
        taught_(problem.teacher.has_value()) {
    if (taught_) {
      second_.emplace(*problem.teacher);
    } else if (problem.guide.has_value() && masks_.have_ceilings()) {
      second_.emplace(*problem.guide);
    }
  }

  const TileKernels<T>& kernels() const {
    return pairs_.products().kernels();
  }
  int64_t n() const {
    return n_;
  }
  int64_t m() const {
    return m_;
  }
  bool rows() const {
    return rows_;
  }
  bool cols() const {
    return cols_;
  }
  bool mirrored() const {
    return mirrored_;
  }
  bool taught() const {
    return taught_;
  }
  Partials<T> partials(int64_t count) const {
    return Partials<T>(count, rows_, cols_ || mirrored_);
  }

  // Of the logits that `exclude` names; empty without it.
  at::Tensor new_excluded() const {
    return full(masks_.excludes() ? n_ : 0, -kInfinity);
  }

  // The dots that are kept for backward, with `keep`. The logits that `exclude` names go to excluded [N], unless it is
  // empty; -inf for an index outside [0, M).
  template <typename Reduction>
  at::Tensor forward(Reduction& reduction, bool keep, const at::Tensor& excluded) {
    T* excluded_logits = values_of<T>(excluded, 0);
    const at::Tensor kept =
        empty_for_reuse({keep ? kept_tiles() * pairs_.members() * kTileSize : 0}, c10::CppTypeToScalarType<T>::value);
    for_each_block({true}, {true}, [&](const Block& block, const PackedForms& packed) {
      reduction.begin(block);
      for_each_task(block.tiles(), work_of(block), new_scratch(), [&](int64_t tile, const Scratch& scratch) {
        if (block.part[tile] == Part::nothing) {
          return;
        }
        T* dots = place_of_dots(kept, block.place[tile], scratch.dots());
        multiply_dots(pairs_, block, tile, packed.pairs, dots);
        reduction.reduce(tile, tile_at(block, tile, packed, dots, scratch.logits(), excluded_logits, scratch));
      });
      reduction.end(block);
    });
    return kept;
  }

  // The gradients of the pairs and of the teacher. grad_excluded [N] is empty without `exclude`.
  template <typename Reduction>
  std::pair<Gradients, Gradients> backward(
      Reduction& reduction, const at::Tensor& kept, const at::Tensor& grad_excluded, Needs needs, Needs teacher_needs) {
    TORCH_CHECK_VALUE(kept.numel() % (pairs_.members() * kTileSize) == 0, "dots must be what the forward kept");
    const Vector<T> of_excluded = grad_excluded.numel() > 0 ? Vector<T>(grad_excluded, n_, T(0), T(0)) : Vector<T>();
    FormGradients<Products> of_pairs(pairs_, needs, row_block_, col_block_);
    std::optional<FormGradients<Products>> of_teacher;
    if (taught_ && teacher_needs.any()) {
      of_teacher.emplace(*second_, teacher_needs, row_block_, col_block_);
    }
    const bool dots = kept.numel() == 0 || kept.numel() < pairs_.members() * kTileSize * visited_tiles();
    const Use second_use = of_teacher ? of_teacher->use(true) : Use{true};
    for_each_block(of_pairs.use(dots), second_use, [&](const Block& block, const PackedForms& packed) {
      of_pairs.begin(block);
      if (of_teacher) {
        of_teacher->begin(block);
      }
      for_each_task(block.tiles(), work_of(block), new_scratch(), [&](int64_t tile, const Scratch& scratch) {
        if (block.part[tile] == Part::nothing) {
          return;
        }
        T* dots = place_of_dots(kept, block.place[tile], scratch.dots());
        if (dots == scratch.dots()) {
          multiply_dots(pairs_, block, tile, packed.pairs, dots);
        }
        T* place = pairs_.of_spans() ? scratch.logits() : of_pairs.place(0, tile);
        const TileAt<T> at = tile_at(block, tile, packed, dots, place, nullptr, scratch);
        const Places<T> places{place, of_pairs.sums(tile)};
        const Places<T> teacher_places =
            of_teacher ? Places<T>{of_teacher->place(0, tile), of_teacher->sums(tile)} : Places<T>();
        reduction.coefficients(at, places, teacher_places);
        if (of_excluded.at(0) != nullptr) {
          masks_.for_each_excluded(at.rows, at.cols, [&](int64_t row, int64_t in_tile) {
            add_excluded(at.pairs, in_tile, *of_excluded.at(row), places);
          });
        }
        if (pairs_.of_spans()) {
          of_pairs.spread(at.rows, at.cols, tile, dots, at.pairs.pairs, place);
        }
      });
      of_pairs.end(block, packed.pairs.x(), packed.pairs.y(), work_of(block));
      if (of_teacher) {
        of_teacher->end(block, packed.second->x(), packed.second->y(), work_of(block));
      }
    });
    // each result of an op is a tensor of its own, of the dtype it always has
    const auto none = [] { return full(0, T(0)); };
    const auto no_features = [&] { return at::empty({0}, pairs_.x().options()); };
    return {
        of_pairs.result(),
        of_teacher ? of_teacher->result() : Gradients{no_features(), no_features(), none(), none(), none(), none()}};
  }

  // f(multiply), where multiply() makes all the dots of the first block and returns their number of multiply-adds.
  template <typename F>
  auto with_products_alone(const F& f) {
    int64_t visited = 0;
    const Block block = block_of(blocks_of(n_, row_block_).front(), blocks_of(m_, col_block_).front(), visited);
    Packing<Products> packing(pairs_, {true}, 1);
    packing.begin_rows(block.rows);
    packing.begin_block(0, block.cols);
    return f([&] {
      for_each_task(block.tiles(), work_of(block), new_scratch(), [&](int64_t tile, const Scratch& scratch) {
        multiply_dots(pairs_, block, tile, packing, scratch.dots());
      });
      return block.rows.size() * block.cols.size() * pairs_.features();
    });
  }

 private:
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  // The packed sides of the forms.
  struct PackedForms {
    Packing<Products> pairs;
    std::optional<Packing<Products>> second;
  };

  // What one thread works on: tiles of dots, one per vector of a tuple, and of logits; with tuples also of distances,
  // and with a second form also of its dots and logits, and one to spare.
  class Scratch {
   public:
    Scratch(int64_t members, bool spans, bool second)
        : members_(members),
          spans_(spans),
          tiles_(
              at::empty({(members + 1 + spans + (second ? 3 : 0)) * kTileSize}, c10::CppTypeToScalarType<T>::value)) {}
    T* dots() const {
      return tile(0);
    }
    T* logits() const {
      return tile(members_);
    }
    T* distances() const {
      return tile(members_ + 1);
    }
    T* second(int64_t index) const {
      return tile(members_ + 1 + spans_ + index);
    }

   private:
    T* tile(int64_t index) const {
      return tiles_.template mutable_data_ptr<T>() + index * kTileSize;
    }
    typename Products::Session session_;
    int64_t members_;
    bool spans_;
    at::Tensor tiles_;
  };
  auto new_scratch() const {
    return [this] { return Scratch(pairs_.members(), pairs_.of_spans(), second_.has_value()); };
  }

  // The side of a block. Where the other side of the plane is short it is longer, for as many pairs: between blocks all
  // threads wait for each other.
  int64_t block_size(int64_t other) const {
    const int64_t block = pairs_.of_spans() ? kSpanBlock : kBlock;
    return block * block / round_up(std::clamp<int64_t>(other, 1, block), kTile);
  }

  // Of the dots of a block and what is made of them, in multiply-adds; an exponential and its sums are some 32.
  int64_t work_of(const Block& block) const {
    return block.rows.size() * block.cols.size() * (pairs_.work() + (second_ ? second_->work() : 0) + 32);
  }

  // `visited` counts the tiles of the blocks before this one, and then those of this one, too.
  Block block_of(Range rows, Range cols, int64_t& visited) {
    Block block{rows, cols, mirrored_, {}, {}};
    for (const auto r : c10::irange(rows.tiles())) {
      for (const auto c : c10::irange(cols.tiles())) {
        block.part.push_back(part_of(rows.tile(r), cols.tile(c)));
        block.place.push_back(visited);
        visited += block.part.back() != Part::nothing;
      }
    }
    return block;
  }

  Part part_of(Range rows, Range cols) {
    if (masks_.leave_out(rows, cols)) {
      return Part::nothing;
    }
    if (!mirrored_ || cols.begin > rows.begin) {
      return Part::both;
    }
    return cols.begin == rows.begin ? Part::rows : Part::nothing;
  }

  static void multiply_dots(
      const Pairs<Products>& form, const Block& block, int64_t tile, const Packing<Products>& packing, T* dots) {
    const Range rows = block.rows_of(tile);
    const Range cols = block.cols_of(tile);
    form.multiply_dots(
        rows.size(), rows.begin - block.rows.begin, cols.begin - block.cols.begin, packing.x(), packing.y(), dots);
  }

  TileAt<T> tile_at(
      const Block& block,
      int64_t tile,
      const PackedForms& packed,
      const T* dots,
      T* logits,
      T* excluded,
      const Scratch& scratch) const {
    const Range rows = block.rows_of(tile);
    const Range cols = block.cols_of(tile);
    const bool to_cols = block.part[tile] == Part::both;
    TileAt<T> at{rows, cols, to_cols, pairs_.tile(rows, cols, dots, scratch.distances()), {}, logits, nullptr, nullptr};
    if (second_) {
      T* second_dots = scratch.second(0);
      multiply_dots(*second_, block, tile, *packed.second, second_dots);
      masks_.apply(kernels(), rows, cols, taught_ ? nullptr : second_dots, logits, excluded, at.pairs);
      at.teacher = second_->tile(rows, cols, second_dots, nullptr);
      at.teacher_logits = scratch.second(1);
      at.spare = scratch.second(2);
    } else {
      masks_.apply(kernels(), rows, cols, nullptr, logits, excluded, at.pairs);
    }
    if (taught_) {
      masks_.apply(kernels(), rows, cols, nullptr, at.teacher_logits, nullptr, at.teacher);
    }
    return at;
  }

  // What a reduction's coefficients do, for one pair that they have left at 0: the gradient `grad` of its logit.
  static void add_excluded(const Tile<T>& tile, int64_t place, T grad, const Places<T>& places) {
    const int64_t i = place / kTile;
    const int64_t j = place % kTile;
    places.coefficients[place] += grad * tile.row_scale[i] * tile.col_scale[j];
    if (places.sums.rows.scale != nullptr) {
      places.sums.rows.scale[i] += grad * tile.col_scale[j] * tile.pairs[place];
      places.sums.rows.bias[i] += grad;
      places.sums.cols.scale[j] += grad * tile.row_scale[i] * tile.pairs[place];
      places.sums.cols.bias[j] += grad;
    }
  }

  // The most tiles whose dots are kept: in the order of the visits, the first that fit.
  int64_t kept_tiles() const {
    const int64_t tiles = round_up(n_, kTile) / kTile * (round_up(m_, kTile) / kTile);
    return std::min(tiles, kKeptDotsBytes / (pairs_.members() * kTileSize * static_cast<int64_t>(sizeof(T))));
  }

  // Where the dots of a tile are kept, or `scratch` where they are not.
  T* place_of_dots(const at::Tensor& kept, int64_t place, T* scratch) const {
    const int64_t offset = place * pairs_.members() * kTileSize;
    return offset < kept.numel() ? values_of<T>(kept, offset) : scratch;
  }

  int64_t visited_tiles() {
    int64_t visited = 0;
    for (const Range rows : blocks_of(n_, row_block_)) {
      for (const Range cols : blocks_of(m_, col_block_)) {
        if (!mirrored_ || cols.begin >= rows.begin) {
          block_of(rows, cols, visited);
        }
      }
    }
    return visited;
  }

  // Visits every block with its packed sides. Blocks without tiles are left out, but for the first ones, where
  // gradients start.
  template <typename Visit>
  void for_each_block(Use use, Use second_use, const Visit& visit) {
    int64_t visited = 0;
    const std::vector<Range> col_blocks = blocks_of(m_, col_block_);
    PackedForms packed{Packing<Products>(pairs_, use, col_blocks.size()), std::nullopt};
    if (second_) {
      packed.second.emplace(*second_, second_use, col_blocks.size());
    }
    for (const Range rows : blocks_of(n_, row_block_)) {
      packed.pairs.begin_rows(rows);
      if (second_) {
        packed.second->begin_rows(rows);
      }
      for (const auto c : c10::irange(col_blocks.size())) {
        const Range cols = col_blocks[c];
        if (mirrored_ && cols.begin < rows.begin) {
          continue;
        }
        const Block block = block_of(rows, cols, visited);
        if (block.empty() && rows.begin > 0 && (mirrored_ || cols.begin > 0)) {
          continue;
        }
        packed.pairs.begin_block(c, cols);
        if (second_) {
          packed.second->begin_block(c, cols);
        }
        visit(block, packed);
      }
    }
  }

  Pairs<Products> pairs_;
  bool rows_;
  bool cols_;
  bool mirrored_;
  int64_t n_;
  int64_t m_;
  int64_t row_block_;
  int64_t col_block_;
  Masks<T> masks_;
  bool taught_;
  std::optional<Pairs<Products>> second_;
};

}  // namespace contrastive_ops
