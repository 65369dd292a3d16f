// The pairs of a form: its sides packed, and their products tile by tile.
//
// With tuples of P vectors, <x_i, y_j> is minus the distance of x_i from the span of tuple j, which P products of tiles
// make.
#pragma once

#include "memory.h"
#include "problem.h"
#include "products.h"
#include "ranges.h"
#include "tasks.h"
#include "tile.h"

#include <ATen/ops/constant_pad_nd.h>
#include <c10/util/irange.h>

#include <limits>
#include <vector>

namespace contrastive_ops {

// Bound on the panels of y that are kept instead of made again, whatever N and M are.
constexpr int64_t kKeptPanelBytes = int64_t(64) << 20;

// One side of a block: its rows as an a, and panels as a b.
struct Packed {
  at::Tensor rows;            // [range, depth]
  at::Tensor depth_panels;    // [range / panel][depth][panel]
  at::Tensor feature_panels;  // [features / panel][range][panel]
};

// What is made of the sides of a form.
struct Use {
  bool dots = false;
  bool x_panels = false;  // for the gradient of y
  bool y_panels = false;  // for that of x
};

template <typename Products>
class Pairs {
 public:
  using T = typename Products::Statistic;
  using Source = typename Products::Source;
  using Operand = typename Products::Operand;

  explicit Pairs(const Form& form)
      : mirrored_(!form.y.has_value()),
        x_(form.x),
        y_(mirrored_ ? form.x : *form.y),
        n_(x_.size(0)),
        m_(y_.size(0)),
        features_(x_.size(1)),
        depth_(products_.depth(features_)),
        members_(form.span.has_value() ? y_.size(1) : 1),
        row_scale_(form.row_scale, n_, T(1), T(0)),
        col_scale_(mirrored_ ? row_scale_ : Vector<T>(form.col_scale, m_, T(1), T(0))),
        row_bias_(form.row_bias, n_, T(0), -kInfinity),
        col_bias_(mirrored_ ? row_bias_ : Vector<T>(form.col_bias, m_, T(0), -kInfinity)) {
    if (form.span.has_value()) {
      row_square_ = Vector<T>(form.span->row_square, n_, T(0), T(0));
      const at::Tensor basis = form.span->basis.to(c10::CppTypeToScalarType<T>::value);
      basis_ = at::constant_pad_nd(basis, {0, round_up(m_, kTile) - m_}).contiguous();
    }
  }

  const Products& products() const {
    return products_;
  }
  const at::Tensor& x() const {
    return x_;
  }
  const at::Tensor& y() const {
    return y_;
  }
  bool mirrored() const {
    return mirrored_;
  }
  bool of_spans() const {
    return basis_.defined();
  }
  int64_t n() const {
    return n_;
  }
  int64_t m() const {
    return m_;
  }
  int64_t features() const {
    return features_;
  }
  // Vectors of a tuple; 1 for dot products.
  int64_t members() const {
    return members_;
  }
  int64_t feature_panels() const {
    return (features_ + products_.panel() - 1) / products_.panel();
  }
  // Of the products of a pair, in multiply-adds.
  int64_t work() const {
    return members_ * depth_;
  }
  // Of the panels of y.
  int64_t panel_bytes(Use use) const {
    return (1 + use.y_panels) * members_ * m_ * depth_ * static_cast<int64_t>(sizeof(Operand));
  }

  static at::Tensor operands(int64_t count) {
    return empty_for_reuse({count * static_cast<int64_t>(sizeof(Operand))}, at::kByte);
  }
  static Operand* operands_of(const at::Tensor& packed) {
    return static_cast<Operand*>(packed.mutable_data_ptr());
  }
  // To read: rows may be the caller's own tensor.
  static const Operand* packed_of(const at::Tensor& packed) {
    return static_cast<const Operand*>(packed.const_data_ptr());
  }

  Packed pack_rows(Range rows, bool dots, bool feature_panels) const {
    return pack(x_, rows, dots, false, feature_panels);
  }

  // The columns of a block: one operand per vector of a tuple.
  std::vector<Packed> pack_cols(Range cols, bool dots, bool feature_panels) const {
    std::vector<Packed> packed;
    for (const auto t : c10::irange(members_)) {
      packed.push_back(pack(of_spans() ? y_.select(1, t) : y_, cols, false, dots, feature_panels));
    }
    return packed;
  }

  // `rows` begin at row_offset of what x holds, `cols` at col_offset of y; a tile of dots per vector of a tuple.
  void multiply_dots(
      int64_t rows, int64_t row_offset, int64_t col_offset, const Packed& x, const std::vector<Packed>& y, T* dots)
      const {
    const int64_t panel = products_.panel();
    const Operand* a = packed_of(x.rows) + row_offset * depth_;
    for (const Packed& operand : y) {
      const Operand* b = packed_of(operand.depth_panels) + col_offset * depth_;
      for (int64_t p = 0; p < kTile; p += panel) {
        products_.multiply_dots(rows, depth_, a, b + p * depth_, dots + p);
      }
      dots += kTileSize;
    }
  }

  SpanTile<T> span_tile(Range rows, Range cols, const T* dots) const {
    const T* basis = basis_.template const_data_ptr<T>() + cols.begin;
    return {rows.size(), members_, dots, basis, basis_.size(1), row_square_.at(rows.begin)};
  }

  // A tile of all pairs, made of its dots; the distances, with tuples, go where the last argument says.
  Tile<T> tile(Range rows, Range cols, const T* dots, T* distances) const {
    if (of_spans()) {
      products_.kernels().distances(span_tile(rows, cols, dots), distances);
    }
    return {
        rows.size(),
        of_spans() ? distances : dots,
        nullptr,
        row_scale_.at(rows.begin),
        col_scale_.at(cols.begin),
        row_bias_.at(rows.begin),
        col_bias_.at(cols.begin)};
  }

 private:
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  Packed pack(const at::Tensor& x, Range range, bool rows, bool depth_panels, bool feature_panels) const {
    const bool whole = range.size() == x.size(0);  // a view has a price, too
    const at::Tensor source = with_dense_vectors<Source>(whole ? x : x.narrow(0, range.begin, range.size()));
    const int64_t ld = source.stride(0);
    Packed packed{rows ? products_.rows(source) : at::Tensor(), {}, {}};
    const int64_t panel = products_.panel();
    const Source* values = source.template const_data_ptr<Source>();
    // whole tiles: a tile multiplies all of its panels
    const int64_t depth_count = depth_panels ? round_up(range.size(), kTile) / panel : 0;
    const int64_t feature_count = feature_panels ? this->feature_panels() : 0;
    const int64_t feature_depth = products_.depth(range.size());
    packed.depth_panels = operands(depth_count * depth_ * panel);
    packed.feature_panels = operands(feature_count * feature_depth * panel);
    Operand* by_depth = operands_of(packed.depth_panels);
    Operand* by_feature = operands_of(packed.feature_panels);
    const int64_t sides = int64_t(depth_panels) + int64_t(feature_panels);
    for_each_task(depth_count + feature_count, kMoveCost * sides * range.size() * features_, [&](int64_t task) {
      if (task < depth_count) {
        const int64_t cols = std::clamp<int64_t>(range.size() - task * panel, 0, panel);
        products_.pack_depth_panel(cols, features_, values + task * panel * ld, ld, by_depth + task * depth_ * panel);
      } else {
        const int64_t p = task - depth_count;
        const int64_t cols = std::min(panel, features_ - p * panel);
        products_.pack_feature_panel(
            range.size(), cols, values + p * panel, ld, by_feature + p * feature_depth * panel);
      }
    });
    return packed;
  }

  Products products_;
  bool mirrored_;
  at::Tensor x_;
  at::Tensor y_;
  int64_t n_;
  int64_t m_;
  int64_t features_;
  int64_t depth_;
  int64_t members_;
  Vector<T> row_scale_;
  Vector<T> col_scale_;
  Vector<T> row_bias_;
  Vector<T> col_bias_;
  Vector<T> row_square_;
  at::Tensor basis_;  // of Span, padded to whole tiles; undefined for dot products
};

// The packed sides of block after block, along rows of blocks. The panels of y are kept for all rows of blocks where
// they are small.
template <typename Products>
class Packing {
 public:
  Packing(const Pairs<Products>& pairs, Use use, size_t col_blocks)
      : pairs_(pairs), use_(use), kept_(pairs.panel_bytes(use) <= kKeptPanelBytes ? col_blocks : 0) {}

  void begin_rows(Range rows) {
    rows_ = rows;
    x_ = pairs_.pack_rows(rows, use_.dots, use_.x_panels && !shared());
  }

  void begin_block(size_t col_block, Range cols) {
    if (kept_.empty()) {
      made_.clear();
      made_ = pairs_.pack_cols(cols, use_.dots, use_.y_panels);
      y_ = &made_;
      return;
    }
    std::vector<Packed>& kept = kept_[col_block];
    if (kept.empty()) {
      kept = pairs_.pack_cols(cols, use_.dots, use_.y_panels);
    }
    if (shared() && cols == rows_) {
      x_.feature_panels = kept.front().feature_panels;
    }
    y_ = &kept;
  }

  const Packed& x() const {
    return x_;
  }
  const std::vector<Packed>& y() const {
    return *y_;
  }

 private:
  // In self-similarity the columns have the same panels, and those of the diagonal come first.
  bool shared() const {
    return pairs_.mirrored() && !kept_.empty();
  }

  const Pairs<Products>& pairs_;
  Use use_;
  Range rows_{};
  Packed x_;
  std::vector<std::vector<Packed>> kept_;  // of each block of columns
  std::vector<Packed> made_;
  const std::vector<Packed>* y_ = nullptr;
};

}  // namespace contrastive_ops
