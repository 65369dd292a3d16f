// similarity_logsumexp on the CPU: row and column log-sum-exps of s_ij = a_i b_j <x_i, y_j> + c_i + d_j, and gradients.
//
//   for each block of the plane, 1024 x 1024, with tuples 512 x 512, or longer where the plane is thin:
//     pack the rows of x and y                                              (bounded, whatever N and M are)
//     for each tile of the block, 128 x 128, in parallel:
//       dots = X Y^T;  s = logits of dots, -inf where a pair does not take part
//       forward:   max and sum of e^s over the rows and over the columns    -> partials of the tile
//       backward:  g = u_i e^(s - row_lse_i) + v_j e^(s - col_lse_j),
//                  the gradient of an excluded pair's own logit in its place -> g a b, in a workspace
//     forward:     fold the partials of the block, in the order of the tiles
//     backward:    dX += (g a b) Y and dY += (g a b)^T X over the whole block, in parallel over rows and columns
//
// Backward computes the dots again, except for those of the first tiles, which forward keeps within 64 MB: a problem
// that is small enough to hold its matrix does the work of the dense loss, and no more. Every sum is taken in an order
// that depends on the shapes alone: results are bitwise equal for any number of threads. In self-similarity (no y)
// tiles below the diagonal are left out; a tile above it also stands for its mirror image.
//
// With tuples of P vectors, <x_i, y_j> is minus the distance of x_i from the span of tuple j: P products of tiles make
// it, and P pairs of coefficients q b_t, q y_t (SpanCoefficients) take the place of g a b in the products of backward.

#include "similarity_logsumexp.h"
#include "memory.h"
#include "products.h"
#include "tasks.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/util/irange.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

namespace contrastive_ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kBlock = 1024;
constexpr int64_t kSpanBlock = 512;  // with tuples, whose coefficients take 2 P places for each pair
constexpr int64_t kTileSize = kTile * kTile;
// Bounds on what is kept instead of made again, whatever N and M are: panels of y, and dots from forward to backward.
constexpr int64_t kKeptPanelBytes = int64_t(64) << 20;
constexpr int64_t kKeptDotsBytes = int64_t(64) << 20;

// A range of rows or columns, cut into tiles.
struct Range {
  int64_t begin;
  int64_t end;

  int64_t size() const {
    return end - begin;
  }
  int64_t tiles() const {
    return (size() + kTile - 1) / kTile;
  }
  Range tile(int64_t t) const {
    return {begin + t * kTile, std::min(begin + (t + 1) * kTile, end)};
  }
  bool contains(int64_t i) const {
    return i >= begin && i < end;
  }
  bool operator==(const Range& other) const {
    return begin == other.begin && end == other.end;
  }
};

std::vector<Range> blocks_of(int64_t n, int64_t block) {
  std::vector<Range> blocks;
  for (int64_t begin = 0; begin < n; begin += block) {
    blocks.push_back({begin, std::min(begin + block, n)});
  }
  return blocks;
}

// A vector of our own: for small problems the price of a tensor counts.
template <typename T>
class Vector {
 public:
  Vector() = default;
  Vector(int64_t n, T value) : values_(n, value) {}

  // The values of a tensor, or `absent` where there is none, padded to whole tiles.
  Vector(const OptionalTensor& tensor, int64_t n, T absent, T padding) : values_(round_up(n, kTile), padding) {
    if (!tensor.has_value()) {
      std::fill_n(values_.begin(), n, absent);
      return;
    }
    const Tensor contiguous = tensor->to(c10::CppTypeToScalarType<T>::value).contiguous();
    std::copy_n(contiguous.template const_data_ptr<T>(), n, values_.begin());
  }

  // Null for a vector that is not there.
  T* at(int64_t offset) {
    return values_.empty() ? nullptr : values_.data() + offset;
  }
  const T* at(int64_t offset) const {
    return values_.empty() ? nullptr : values_.data() + offset;
  }

 private:
  std::vector<T> values_;
};

struct IdRange {
  int64_t min;
  int64_t max;

  bool disjoint(const IdRange& other) const {
    return max < other.min || other.max < min;
  }
};

// Group ids, padded to whole tiles, and their range in each tile: with sorted ids most tiles need no look at the pairs.
struct Ids {
  Vector<int64_t> values;
  std::vector<IdRange> ranges;

  Ids(const OptionalTensor& ids, int64_t n) {
    if (!ids.has_value()) {
      return;
    }
    values = Vector<int64_t>(ids, n, 0, 0);
    const int64_t* id = values.at(0);
    for (int64_t begin = 0; begin < n; begin += kTile) {
      const auto [low, high] = std::minmax_element(id + begin, id + std::min(begin + kTile, n));
      ranges.push_back({*low, *high});
    }
  }
  bool given() const {
    return values.at(0) != nullptr;
  }
};

// What a tile above, on, or below the diagonal contributes to.
enum class Part : uint8_t { nothing, rows, both };

// The tiles of a block, and the place of each among the kept dots: the number of tiles visited before it.
struct Plan {
  std::vector<Part> part;
  std::vector<int64_t> place;

  bool empty() const {
    return std::all_of(part.begin(), part.end(), [](Part of_tile) { return of_tile == Part::nothing; });
  }
};

template <typename Products>
class Engine {
 public:
  using T = typename Products::Statistic;
  using Source = typename Products::Source;
  using Operand = typename Products::Operand;
  using Session = typename Products::Session;

  explicit Engine(const SimilarityOptions& options)
      : mirrored_(!options.y.has_value()),
        restrict_(options.restrict_to_ids),
        rows_(options.rows),
        cols_(options.cols),
        x_(options.x),
        y_(mirrored_ ? options.x : *options.y),
        n_(x_.size(0)),
        m_(y_.size(0)),
        features_(x_.size(1)),
        depth_(products_.depth(features_)),
        members_(options.span.has_value() ? y_.size(1) : 1),
        row_block_(block_size(options, m_)),
        col_block_(block_size(options, n_)),
        totals_(options.totals),
        row_scale_(options.row_scale, n_, T(1), T(0)),
        col_scale_(mirrored_ ? row_scale_ : Vector<T>(options.col_scale, m_, T(1), T(0))),
        row_bias_(options.row_bias, n_, T(0), -kInfinity),
        col_bias_(mirrored_ ? row_bias_ : Vector<T>(options.col_bias, m_, T(0), -kInfinity)),
        row_ids_(options.row_ids, n_),
        col_ids_(mirrored_ ? row_ids_ : Ids(options.col_ids, m_)) {
    if (options.span.has_value()) {
      row_square_ = Vector<T>(options.span->row_square, n_, T(0), T(0));
      basis_ = at::constant_pad_nd(options.span->basis.to(dtype()), {0, round_up(m_, kTile) - m_}).contiguous();
    }
    if (options.exclude.has_value()) {
      exclude_ = options.exclude->contiguous();
    }
    if (exclude_.defined() && restrict_) {
      find_excluded_tiles();
    }
  }

  SimilarityStatistics forward(bool keep);
  SimilarityGradients backward(const SimilarityStatistics& statistics, const IncomingGradients& incoming, Needs needs);
  double product_rate(double seconds);

 private:
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  // The side of a block. Where the other side of the plane is short it is longer, for as many pairs: between blocks all
  // threads wait for each other.
  static int64_t block_size(const SimilarityOptions& options, int64_t other) {
    const int64_t block = options.span.has_value() ? kSpanBlock : kBlock;
    return block * block / round_up(std::clamp<int64_t>(other, 1, block), kTile);
  }

  // The gradients of one direction with its statistics, padded. An empty set gives nothing: e^(-inf - inf) = 0.
  class DirectionGradient {
   public:
    DirectionGradient() = default;
    DirectionGradient(const Tensor& grad_lse, const Tensor& max, const Tensor& log_sum)
        : grad_lse_(grad_lse, max.size(0), T(0), T(0)),
          max_(max, max.size(0), T(0), kInfinity),
          log_sum_(log_sum, max.size(0), T(0), T(0)) {
      for (const auto i : c10::irange(max.size(0))) {
        if (*max_.at(i) == -kInfinity) {
          *max_.at(i) = kInfinity;
          *log_sum_.at(i) = T(0);
          *grad_lse_.at(i) = T(0);
        }
      }
    }
    void set_total(Vector<T> grad_total) {
      grad_total_ = std::move(grad_total);
    }
    Direction<T> from(int64_t offset) const {
      return {grad_lse_.at(offset), max_.at(offset), log_sum_.at(offset), grad_total_.at(offset)};
    }

   private:
    Vector<T> grad_lse_;
    Vector<T> max_;
    Vector<T> log_sum_;
    Vector<T> grad_total_;
  };

  // What one thread works on: tiles of dots, one per vector of a tuple, and of logits; with tuples also of distances.
  class Scratch {
   public:
    explicit Scratch(int64_t members, bool span)
        : members_(members), tiles_(at::empty({(members + 1 + span) * kTileSize}, dtype())) {}
    T* dots() const {
      return tile(0);
    }
    T* logits() const {
      return tile(members_);
    }
    T* distances() const {
      return tile(members_ + 1);
    }

   private:
    T* tile(int64_t index) const {
      return tiles_.template mutable_data_ptr<T>() + index * kTileSize;
    }
    Session session_;
    int64_t members_;
    Tensor tiles_;
  };
  auto new_scratch() const {
    return [this] { return Scratch(members_, basis_.defined()); };
  }

  // What one thread makes strips of coefficients in, as long as a block is.
  struct StripScratch {
    explicit StripScratch(int64_t length) : strip(operands(kTile * length)) {}
    Session session;
    Tensor strip;
  };
  auto new_strip_scratch() const {
    return
        [this] { return StripScratch(round_up(std::max(std::min(row_block_, n_), std::min(col_block_, m_)), kTile)); };
  }

  // A tile of coefficients, or its transpose, of a strip; null where there is none.
  struct StripTile {
    const T* values;
    int64_t rows;
    bool transposed;
  };

  static constexpr c10::ScalarType dtype() {
    return c10::CppTypeToScalarType<T>::value;
  }

  // The values of a statistic from an offset on; null for one that is empty.
  static T* values_of(const Tensor& statistic, int64_t offset) {
    return statistic.numel() == 0 ? nullptr : statistic.mutable_data_ptr<T>() + offset;
  }

  static Tensor full(int64_t n, T value) {
    return at::full({n}, value, dtype());
  }

  // One side of a block: its rows as an a, and panels as a b.
  struct Packed {
    Tensor rows;            // [range, depth]
    Tensor depth_panels;    // [range / panel][depth][panel]
    Tensor feature_panels;  // [features / panel][range][panel]
  };

  int64_t feature_panels() const {
    return (features_ + products_.panel() - 1) / products_.panel();
  }

  static Tensor operands(int64_t count) {
    return empty_for_reuse({count * static_cast<int64_t>(sizeof(Operand))}, at::kByte);
  }

  static Operand* operands_of(const Tensor& packed) {
    return static_cast<Operand*>(packed.mutable_data_ptr());
  }

  // To read: rows may be the caller's own tensor.
  static const Operand* packed_of(const Tensor& packed) {
    return static_cast<const Operand*>(packed.const_data_ptr());
  }

  Packed pack(const Tensor& x, Range range, bool rows, bool depth_panels, bool feature_panels) const {
    const bool whole = range.size() == x.size(0);  // a view has a price, too
    const Tensor source = with_dense_vectors<Source>(whole ? x : x.narrow(0, range.begin, range.size()));
    const int64_t ld = source.stride(0);
    Packed packed{rows ? products_.rows(source) : Tensor(), {}, {}};
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

  // Of the dots of a block and what is made of them, in multiply-adds; an exponential and its sums are some 32.
  int64_t work_of(Range rows, Range cols) const {
    return rows.size() * cols.size() * (members_ * depth_ + 32);
  }

  bool ids_disjoint(Range rows, Range cols) const {
    return row_ids_.ranges[rows.begin / kTile].disjoint(col_ids_.ranges[cols.begin / kTile]);
  }

  // Whether ids may take a pair of a tile out.
  bool may_mask_ids(Range rows, Range cols) const {
    const IdRange& of_rows = row_ids_.ranges[rows.begin / kTile];
    const IdRange& of_cols = col_ids_.ranges[cols.begin / kTile];
    const bool all_equal = of_rows.min == of_cols.max && of_cols.min == of_rows.max;
    return restrict_ ? !all_equal : !of_rows.disjoint(of_cols);
  }

  std::vector<bool>::reference excluded_tile(int64_t row, int64_t col) {
    return excluded_tiles_[row / kTile * (round_up(m_, kTile) / kTile) + col / kTile];
  }

  // A tile without a pair of equal ids is visited all the same when the logit of an excluded pair is in it.
  void find_excluded_tiles() {
    excluded_tiles_.assign(round_up(n_, kTile) / kTile * (round_up(m_, kTile) / kTile), false);
    const int64_t* exclude = exclude_.const_data_ptr<int64_t>();
    for (const auto i : c10::irange(n_)) {
      if (Range{0, m_}.contains(exclude[i])) {
        excluded_tile(i, exclude[i]) = true;
        excluded_tile(mirrored_ ? exclude[i] : i, mirrored_ ? i : exclude[i]) = true;
      }
    }
  }

  // The columns of a block: one operand per vector of a tuple.
  std::vector<Packed> pack_cols(Range cols, bool depth_panels, bool feature_panels) const {
    std::vector<Packed> packed;
    for (const auto t : c10::irange(members_)) {
      packed.push_back(pack(basis_.defined() ? y_.select(1, t) : y_, cols, false, depth_panels, feature_panels));
    }
    return packed;
  }

  Part part_of(Range rows, Range cols) {
    if (restrict_ && ids_disjoint(rows, cols) && !(exclude_.defined() && excluded_tile(rows.begin, cols.begin))) {
      return Part::nothing;
    }
    if (!mirrored_ || cols.begin > rows.begin) {
      return Part::both;
    }
    return cols.begin == rows.begin ? Part::rows : Part::nothing;
  }

  void multiply_dots(
      Range rows,
      Range cols,
      Range block_rows,
      Range block_cols,
      const Packed& x,
      const std::vector<Packed>& y,
      T* dots) const {
    const int64_t panel = products_.panel();
    const Operand* a = packed_of(x.rows) + (rows.begin - block_rows.begin) * depth_;
    for (const Packed& operand : y) {
      const Operand* b = packed_of(operand.depth_panels) + (cols.begin - block_cols.begin) * depth_;
      for (int64_t p = 0; p < kTile; p += panel) {
        products_.multiply_dots(rows.size(), depth_, a, b + p * depth_, dots + p);
      }
      dots += kTileSize;
    }
  }

  SpanTile<T> span_tile(Range rows, Range cols, const T* dots) const {
    const T* basis = basis_.template const_data_ptr<T>() + cols.begin;
    return {rows.size(), members_, dots, basis, basis_.size(1), row_square_.at(rows.begin)};
  }

  // The pairs of a tile: the dots themselves, or minus the distances, in `scratch`.
  const T* pairs(Range rows, Range cols, const T* dots, const Scratch& scratch) const {
    if (!basis_.defined()) {
      return dots;
    }
    products_.kernels().distances(span_tile(rows, cols, dots), scratch.distances());
    return scratch.distances();
  }

  // f(row, place in the tile) for the pairs (row, exclude[row]) of a tile. In self-similarity the row may be either
  // side of the pair; on the diagonal both places of a pair are in the tile.
  template <typename F>
  void for_each_excluded(Range rows, Range cols, const F& f) const {
    if (!exclude_.defined()) {
      return;
    }
    const int64_t* exclude = exclude_.const_data_ptr<int64_t>();
    for (const auto i : c10::irange(rows.begin, rows.end)) {
      if (cols.contains(exclude[i])) {
        f(i, (i - rows.begin) * kTile + exclude[i] - cols.begin);
      }
    }
    for (int64_t j = cols.begin; mirrored_ && j < cols.end; ++j) {
      if (rows.contains(exclude[j])) {
        f(j, (exclude[j] - rows.begin) * kTile + j - cols.begin);
      }
    }
  }

  // A tile, whose logits are stored only where a pair does not take part. Those that `exclude` names go to
  // excluded[row], unless it is null.
  Tile<T> tile_of(Range rows, Range cols, const T* pairs, T* logits, T* excluded) const {
    Tile<T> tile{
        rows.size(),
        pairs,
        nullptr,
        row_scale_.at(rows.begin),
        col_scale_.at(cols.begin),
        row_bias_.at(rows.begin),
        col_bias_.at(cols.begin)};
    const auto store = [&] {
      if (tile.logits == nullptr) {
        products_.kernels().logits(tile, logits);
        tile.logits = logits;
      }
    };
    for_each_excluded(rows, cols, [&](int64_t row, int64_t place) {
      store();
      if (excluded != nullptr) {  // all are read before any is masked: two rows may name each other
        excluded[row] = logits[place];
      }
    });
    for_each_excluded(rows, cols, [&](int64_t, int64_t place) { logits[place] = -kInfinity; });
    if (row_ids_.given() && may_mask_ids(rows, cols)) {
      store();
      products_.kernels().mask_ids(
          rows.size(), row_ids_.values.at(rows.begin), col_ids_.values.at(cols.begin), restrict_, logits);
    }
    return tile;
  }

  // What kernels.coefficients does, for one pair that it has left at 0: the gradient `grad` of its logit.
  static void add_excluded(
      const Tile<T>& tile,
      int64_t place,
      T grad,
      ScaleBiasSums<T> row_sums,
      ScaleBiasSums<T> col_sums,
      T* coefficients) {
    const int64_t i = place / kTile;
    const int64_t j = place % kTile;
    coefficients[place] += grad * tile.row_scale[i] * tile.col_scale[j];
    if (row_sums.scale != nullptr) {
      row_sums.scale[i] += grad * tile.col_scale[j] * tile.pairs[place];
      row_sums.bias[i] += grad;
      col_sums.scale[j] += grad * tile.row_scale[i] * tile.pairs[place];
      col_sums.bias[j] += grad;
    }
  }

  // `visited` counts the tiles of the blocks before this one, and then those of this one, too.
  Plan plan_of(Range block_rows, Range block_cols, int64_t& visited) {
    Plan plan;
    for (const auto r : c10::irange(block_rows.tiles())) {
      for (const auto c : c10::irange(block_cols.tiles())) {
        plan.part.push_back(part_of(block_rows.tile(r), block_cols.tile(c)));
        plan.place.push_back(visited);
        visited += plan.part.back() != Part::nothing;
      }
    }
    return plan;
  }

  // The most tiles whose dots are kept: in the order of the visits, the first that fit.
  int64_t kept_tiles() const {
    const int64_t tiles = round_up(n_, kTile) / kTile * (round_up(m_, kTile) / kTile);
    return std::min(tiles, kKeptDotsBytes / (members_ * kTileSize * static_cast<int64_t>(sizeof(T))));
  }

  // Where the dots of a tile are kept, or `scratch` where they are not.
  T* place_of_dots(const Tensor& kept, int64_t place, T* scratch) const {
    const int64_t offset = place * members_ * kTileSize;
    return offset < kept.numel() ? values_of(kept, offset) : scratch;
  }

  // to_rows(range, tile) for the tiles of a block that contribute to its rows, to_cols likewise, in a fixed order.
  template <typename Rows, typename Cols>
  static void for_each_contribution(
      Range block_rows, Range block_cols, const std::vector<Part>& part, const Rows& to_rows, const Cols& to_cols) {
    const int64_t tile_cols = block_cols.tiles();
    for (const auto tile : c10::irange(static_cast<int64_t>(part.size()))) {
      if (part[tile] != Part::nothing) {
        to_rows(block_rows.tile(tile / tile_cols), tile);
      }
      if (part[tile] == Part::both) {
        to_cols(block_cols.tile(tile % tile_cols), tile);
      }
    }
  }

  int64_t visited_tiles() {
    int64_t visited = 0;
    for (const Range rows : blocks_of(n_, row_block_)) {
      for (const Range cols : blocks_of(m_, col_block_)) {
        if (!mirrored_ || cols.begin >= rows.begin) {
          plan_of(rows, cols, visited);
        }
      }
    }
    return visited;
  }

  // Visits every block with its packed sides and its plan; `dots_kept` counts the dots that need no panels to make
  // them. The panels of y are kept for all rows of blocks where they are small. Blocks without tiles are left out, but
  // for the first ones, where gradients start.
  template <typename Visit>
  void for_each_block(bool x_panels, bool y_panels, int64_t dots_kept, const Visit& visit) {
    int64_t visited = 0;
    const bool dots_needed = dots_kept == 0 || dots_kept < members_ * kTileSize * visited_tiles();
    const std::vector<Range> col_blocks = blocks_of(m_, col_block_);
    const int64_t bytes = (1 + y_panels) * members_ * m_ * depth_ * static_cast<int64_t>(sizeof(Operand));
    std::vector<std::vector<Packed>> kept(bytes <= kKeptPanelBytes ? col_blocks.size() : 0);
    for (const Range rows : blocks_of(n_, row_block_)) {
      // in self-similarity the columns have the same panels, and those of the diagonal come first
      const bool shared = mirrored_ && !kept.empty();
      Packed x = pack(x_, rows, dots_needed, false, x_panels && !shared);
      for (const auto c : c10::irange(col_blocks.size())) {
        const Range cols = col_blocks[c];
        if (mirrored_ && cols.begin < rows.begin) {
          continue;
        }
        const Plan plan = plan_of(rows, cols, visited);
        if (plan.empty() && rows.begin > 0 && (mirrored_ || cols.begin > 0)) {
          continue;
        }
        if (kept.empty()) {
          visit(rows, cols, x, pack_cols(cols, dots_needed, y_panels), plan);
        } else {
          if (kept[c].empty()) {
            kept[c] = pack_cols(cols, dots_needed, y_panels);
          }
          if (shared && cols == rows) {
            x.feature_panels = kept[c].front().feature_panels;
          }
          visit(rows, cols, x, kept[c], plan);
        }
      }
    }
  }

  Products products_;
  bool mirrored_;
  bool restrict_;
  bool rows_;
  bool cols_;
  Tensor x_;
  Tensor y_;
  int64_t n_;
  int64_t m_;
  int64_t features_;
  int64_t depth_;
  int64_t members_;  // vectors of a tuple; 1 for dot products
  int64_t row_block_;
  int64_t col_block_;
  bool totals_;
  Vector<T> row_scale_;
  Vector<T> col_scale_;
  Vector<T> row_bias_;
  Vector<T> col_bias_;
  Ids row_ids_;
  Ids col_ids_;
  Vector<T> row_square_;
  Tensor basis_;  // of Span, padded to whole tiles; undefined for dot products
  Tensor exclude_;
  std::vector<bool> excluded_tiles_;  // of the whole plane; only where ids restrict
};

template <typename Products>
SimilarityStatistics Engine<Products>::forward(bool keep) {
  const TileKernels<T>& kernels = products_.kernels();
  const Tensor row_max = full(rows_ ? n_ : 0, -kInfinity);
  const Tensor row_sum = full(rows_ ? n_ : 0, T(0));
  const Tensor col_max = full(cols_ ? m_ : 0, -kInfinity);
  const Tensor col_sum = full(cols_ ? m_ : 0, T(0));
  const Tensor row_total = full(rows_ && totals_ ? n_ : 0, T(0));
  const Tensor col_total = full(cols_ && totals_ ? m_ : 0, T(0));
  const bool to_cols = cols_ || mirrored_;
  // the columns of a tile above the diagonal are rows of its mirror image
  const Tensor& of_cols_max = mirrored_ ? row_max : col_max;
  const Tensor& of_cols_sum = mirrored_ ? row_sum : col_sum;
  const Tensor& of_cols_total = mirrored_ ? row_total : col_total;

  const Tensor excluded = full(exclude_.defined() ? n_ : 0, -kInfinity);
  T* excluded_logits = values_of(excluded, 0);
  const Tensor kept = empty_for_reuse({keep ? kept_tiles() * members_ * kTileSize : 0}, dtype());

  const auto visit =
      [&](Range block_rows, Range block_cols, const Packed& x, const std::vector<Packed>& y, const Plan& plan) {
        const int64_t tile_cols = block_cols.tiles();
        const int64_t tiles = block_rows.tiles() * tile_cols;
        const std::vector<Part>& part = plan.part;
        // partials of a tile: the maxima, the sums and the totals of its 128 rows, and the same of its columns
        Vector<T> row_partials(rows_ ? tiles * 3 * kTile : 0, T(0));
        Vector<T> col_partials(to_cols ? tiles * 3 * kTile : 0, T(0));
        const auto partial = [](Vector<T>& partials, int64_t tile) {
          T* max = partials.at(tile * 3 * kTile);
          return MaxSum<T>{max, max == nullptr ? nullptr : max + kTile};
        };
        const auto total = [](Vector<T>& partials, int64_t tile) {
          T* max = partials.at(tile * 3 * kTile);
          return max == nullptr ? nullptr : max + 2 * kTile;
        };
        Vector<T> nothing;

        for_each_task(tiles, work_of(block_rows, block_cols), new_scratch(), [&](int64_t tile, const Scratch& scratch) {
          const Range rows = block_rows.tile(tile / tile_cols);
          const Range cols = block_cols.tile(tile % tile_cols);
          if (part[tile] == Part::nothing) {
            return;
          }
          T* dots = place_of_dots(kept, plan.place[tile], scratch.dots());
          multiply_dots(rows, cols, block_rows, block_cols, x, y, dots);
          const Tile<T> of_logits =
              tile_of(rows, cols, pairs(rows, cols, dots, scratch), scratch.logits(), excluded_logits);
          Vector<T>& of_cols = part[tile] == Part::both ? col_partials : nothing;
          kernels.reduce(of_logits, partial(row_partials, tile), partial(of_cols, tile));
          if (totals_) {
            kernels.totals(of_logits, total(row_partials, tile), total(of_cols, tile));
          }
        });

        // in this thread: for a whole block it is some 20 us
        const auto fold_into = [&](const Tensor& max, const Tensor& sum, const Tensor& all, Vector<T>& partials) {
          return [&, max, sum, all](Range range, int64_t tile) {
            kernels.fold(
                range.size(), {values_of(max, range.begin), values_of(sum, range.begin)}, partial(partials, tile));
            T* of_range = values_of(all, range.begin);
            for (int64_t i = 0; of_range != nullptr && i < range.size(); ++i) {
              of_range[i] += total(partials, tile)[i];
            }
          };
        };
        const auto skip = [](Range, int64_t) {};
        const auto fold_rows = fold_into(row_max, row_sum, row_total, row_partials);
        const auto fold_cols = fold_into(of_cols_max, of_cols_sum, of_cols_total, col_partials);
        if (rows_ && to_cols) {
          for_each_contribution(block_rows, block_cols, part, fold_rows, fold_cols);
        } else if (rows_) {
          for_each_contribution(block_rows, block_cols, part, fold_rows, skip);
        } else {
          for_each_contribution(block_rows, block_cols, part, skip, fold_cols);
        }
      };
  for_each_block(false, false, 0, visit);
  // the logs go where the sums were
  const auto log_sum_exp = [](const Tensor& max, const Tensor& sum) {
    const Tensor lse = at::empty({max.size(0)}, dtype());
    const T* of_max = max.const_data_ptr<T>();
    T* of_sum = sum.mutable_data_ptr<T>();
    T* of_lse = lse.mutable_data_ptr<T>();
    for (const auto i : c10::irange(max.size(0))) {
      of_sum[i] = std::log(of_sum[i]);
      of_lse[i] = of_max[i] + of_sum[i];
    }
    return lse;
  };
  const Tensor row_lse = log_sum_exp(row_max, row_sum);
  const Tensor col_lse = log_sum_exp(col_max, col_sum);
  return {row_max, col_max, row_sum, col_sum, excluded, row_total, col_total, kept, row_lse, col_lse};
}

template <typename Products>
SimilarityGradients Engine<Products>::backward(
    const SimilarityStatistics& statistics, const IncomingGradients& incoming, Needs needs) {
  const TileKernels<T>& kernels = products_.kernels();
  TORCH_CHECK_VALUE(statistics.dots.numel() % (members_ * kTileSize) == 0, "dots must be what the forward kept");
  const bool span = basis_.defined();
  const int64_t panel = products_.panel();
  const int64_t padded_features = feature_panels() * panel;
  const bool to_x = needs.x;
  const bool to_y = mirrored_ ? needs.x : needs.y;
  const bool sums = needs.row_scale || needs.col_scale || needs.row_bias || needs.col_bias;

  DirectionGradient of_rows =
      rows_ ? DirectionGradient(incoming.row_lse, statistics.row_max, statistics.row_log_sum) : DirectionGradient();
  DirectionGradient own_cols = cols_ && !mirrored_
                                   ? DirectionGradient(incoming.col_lse, statistics.col_max, statistics.col_log_sum)
                                   : DirectionGradient();
  if (totals_) {
    of_rows.set_total(rows_ ? Vector<T>(incoming.row_total, n_, T(0), T(0)) : Vector<T>(round_up(n_, kTile), T(0)));
    own_cols.set_total(cols_ ? Vector<T>(incoming.col_total, m_, T(0), T(0)) : Vector<T>(round_up(m_, kTile), T(0)));
  }
  const DirectionGradient& of_cols = mirrored_ ? of_rows : own_cols;
  const Vector<T> of_excluded = exclude_.defined() ? Vector<T>(incoming.excluded, n_, T(0), T(0)) : Vector<T>();

  // the first block of a strip of rows or columns overwrites, the others add; without blocks there is nothing to add
  const auto features_gradient = [&](int64_t rows, int64_t members) {
    const int64_t sizes[] = {rows, members, padded_features};
    return n_ * m_ == 0 ? at::zeros(sizes, dtype()) : empty_for_reuse(sizes, dtype());
  };
  const Tensor grad_x = features_gradient(to_x ? n_ : 0, 1);
  const Tensor grad_y = mirrored_ ? grad_x : features_gradient(to_y ? m_ : 0, members_);
  const Tensor row_scale_sum = full(sums ? n_ : 0, T(0));
  const Tensor row_bias_sum = full(sums ? n_ : 0, T(0));
  const Tensor col_scale_sum = mirrored_ ? row_scale_sum : full(sums ? m_ : 0, T(0));
  const Tensor col_bias_sum = mirrored_ ? row_bias_sum : full(sums ? m_ : 0, T(0));
  const Tensor square_sum = full(span ? n_ : 0, T(0));

  // the coefficients of a block, rows of tiles: of the dot products, or with tuples of the products for x with each
  // vector and then of those for y
  const int64_t workspace = round_up(std::min(row_block_, n_), kTile) * round_up(std::min(col_block_, m_), kTile);
  const Tensor coefficients = empty_for_reuse({(span ? 2 * members_ : 1) * workspace}, dtype());

  const auto visit =
      [&](Range block_rows, Range block_cols, const Packed& x, const std::vector<Packed>& y, const Plan& plan) {
        const int64_t tile_rows = block_rows.tiles();
        const int64_t tile_cols = block_cols.tiles();
        const int64_t tiles = tile_rows * tile_cols;
        const bool diagonal = mirrored_ && block_rows == block_cols;
        const std::vector<Part>& part = plan.part;
        // partials of tile (r, c): the sums for scale, then for bias of its 128 rows, and the same of its columns
        Vector<T> row_partials(sums ? tiles * 2 * kTile : 0, T(0));
        Vector<T> col_partials(sums ? tiles * 2 * kTile : 0, T(0));
        Vector<T> square_partials(span ? tiles * kTile : 0, T(0));
        const auto partial = [&](Vector<T>& partials, int64_t tile) {
          T* scale = partials.at(tile * 2 * kTile);
          return sums ? ScaleBiasSums<T>{scale, scale + kTile} : ScaleBiasSums<T>{nullptr, nullptr};
        };
        const auto place_of = [&](int64_t operand, int64_t r, int64_t c) {
          return values_of(coefficients, operand * workspace + (r * tile_cols + c) * kTileSize);
        };
        const auto of_x = [](int64_t t) { return t; };
        const auto of_y = [&](int64_t t) { return span ? members_ + t : t; };

        for_each_task(tiles, work_of(block_rows, block_cols), new_scratch(), [&](int64_t tile, const Scratch& scratch) {
          const int64_t r = tile / tile_cols;
          const int64_t c = tile % tile_cols;
          const Range rows = block_rows.tile(r);
          const Range cols = block_cols.tile(c);
          if (part[tile] == Part::nothing) {
            return;
          }
          T* dots = place_of_dots(statistics.dots, plan.place[tile], scratch.dots());
          if (dots == scratch.dots()) {
            multiply_dots(rows, cols, block_rows, block_cols, x, y, dots);
          }
          T* place = span ? scratch.logits() : place_of(0, r, c);
          const ScaleBiasSums<T> row_sums = partial(row_partials, tile);
          const ScaleBiasSums<T> col_sums = partial(col_partials, tile);
          const Tile<T> of_logits = tile_of(rows, cols, pairs(rows, cols, dots, scratch), place, nullptr);
          kernels.coefficients(
              of_logits, of_rows.from(rows.begin), of_cols.from(cols.begin), row_sums, col_sums, place);
          for_each_excluded(rows, cols, [&](int64_t row, int64_t at) {
            add_excluded(of_logits, at, *of_excluded.at(row), row_sums, col_sums, place);
          });
          if (span) {
            SpanCoefficients<T> operands{{}, {}, square_partials.at(tile * kTile)};
            for (const auto t : c10::irange(members_)) {
              operands.of_x[t] = place_of(of_x(t), r, c);
              operands.of_y[t] = place_of(of_y(t), r, c);
            }
            kernels.spread(span_tile(rows, cols, dots), of_logits.pairs, place, operands);
          }
        });

        // tile (r, c) of the coefficients for x; within a diagonal block it may be the mirror image of (c, r)
        const auto tile_for_x = [&](int64_t t, int64_t r, int64_t c) -> StripTile {
          if (part[r * tile_cols + c] != Part::nothing) {
            return {place_of(of_x(t), r, c), block_rows.tile(r).size(), false};
          }
          const bool mirror = diagonal && part[c * tile_cols + r] == Part::both;
          return {mirror ? place_of(of_x(t), c, r) : nullptr, block_rows.tile(c).size(), true};
        };
        const auto tile_for_y = [&](int64_t t, int64_t r, int64_t c) -> StripTile {
          const bool present = part[r * tile_cols + c] != Part::nothing;
          return {present ? place_of(of_y(t), r, c) : nullptr, block_rows.tile(r).size(), true};
        };
        // 128 rows of a gradient: the tiles (tile_at) along a depth times the feature panels, over runs of present
        // tiles
        const auto multiply_strip = [&](Range range,
                                        Range depth_range,
                                        const auto& tile_at,
                                        const Packed& other,
                                        T* grad,
                                        int64_t ld,
                                        bool accumulate,
                                        const StripScratch& scratch) {
          const int64_t depth_tiles = depth_range.tiles();
          const int64_t panel_size = products_.depth(depth_range.size()) * panel;
          const Operand* panels = packed_of(other.feature_panels);
          Operand* strip = operands_of(scratch.strip);
          T* target = grad + range.begin * ld;
          for (int64_t begin = 0, end = 0; begin < depth_tiles; begin = end + 1) {
            for (end = begin; end < depth_tiles; ++end) {
              const StripTile tile = tile_at(end);
              if (tile.values == nullptr) {
                break;
              }
              products_.pack_tile(tile.rows, tile.values, tile.transposed, strip + end * kTileSize);
            }
            const int64_t first = begin * kTile;
            const int64_t depth = std::min(end * kTile, depth_range.size()) - first;
            if (depth <= 0) {
              continue;
            }
            for (int64_t p = 0; p < feature_panels(); ++p) {
              products_.multiply_strip(
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
              std::fill_n(target + i * ld, padded_features, T(0));
            }
          }
        };
        const bool x_started = block_cols.begin > 0 || (mirrored_ && block_rows.begin > 0);
        const bool y_started = block_rows.begin > 0;
        const int64_t x_tasks = to_x ? tile_rows : 0;
        const int64_t y_tasks = to_y && !diagonal ? tile_cols * members_ : 0;
        const int64_t work = 2 * work_of(block_rows, block_cols);
        for_each_task(x_tasks + y_tasks, work, new_strip_scratch(), [&](int64_t task, const StripScratch& scratch) {
          if (task < x_tasks) {
            for (const auto t : c10::irange(members_)) {
              multiply_strip(
                  block_rows.tile(task),
                  block_cols,
                  [&](int64_t c) { return tile_for_x(t, task, c); },
                  y[t],
                  values_of(grad_x, 0),
                  padded_features,
                  x_started || t > 0,
                  scratch);
            }
          } else {
            const int64_t c = (task - x_tasks) / members_;
            const int64_t t = (task - x_tasks) % members_;
            multiply_strip(
                block_cols.tile(c),
                block_rows,
                [&](int64_t r) { return tile_for_y(t, r, c); },
                x,
                values_of(grad_y, t * padded_features),
                grad_y.stride(0),
                y_started,
                scratch);
          }
        });

        const auto add = [](const Tensor& sum, Range range, const T* part_sum) {
          T* of_range = values_of(sum, range.begin);
          for (int64_t i = 0; of_range != nullptr && i < range.size(); ++i) {
            of_range[i] += part_sum[i];
          }
        };
        for_each_contribution(
            block_rows,
            block_cols,
            part,
            [&](Range rows, int64_t tile) {
              add(row_scale_sum, rows, partial(row_partials, tile).scale);
              add(row_bias_sum, rows, partial(row_partials, tile).bias);
              add(square_sum, rows, square_partials.at(tile * kTile));
            },
            [&](Range cols, int64_t tile) {
              add(col_scale_sum, cols, partial(col_partials, tile).scale);
              add(col_bias_sum, cols, partial(col_partials, tile).bias);
            });
      };
  for_each_block(to_y, to_x, statistics.dots.numel(), visit);

  const auto unpadded = [&](const Tensor& grad) { return grad.narrow(2, 0, features_); };
  const auto none = [](const Tensor& like) { return at::empty({0}, like.options()); };
  const auto vector_of = [&](const Tensor& sum, bool need) { return need ? sum : none(sum); };
  if (span && to_x) {
    grad_x.select(1, 0).narrow(1, 0, features_).addcmul_(x_.to(dtype()), square_sum.unsqueeze(1), -1);
  }
  return {
      needs.x ? unpadded(grad_x).select(1, 0).contiguous().to(x_.scalar_type()) : none(x_),
      !needs.y ? none(y_)
      : span   ? unpadded(grad_y).contiguous()
               : unpadded(grad_y).select(1, 0).contiguous().to(y_.scalar_type()),
      vector_of(row_scale_sum, needs.row_scale),
      vector_of(col_scale_sum, needs.col_scale),
      vector_of(row_bias_sum, needs.row_bias),
      vector_of(col_bias_sum, needs.col_bias)};
}

// Multiply-adds per second of the dots of one block alone, x 2: the roof of the engine on this machine, now.
template <typename Products>
double Engine<Products>::product_rate(double seconds) {
  const auto start = std::chrono::steady_clock::now();
  double flops = 0.0;
  double elapsed = 0.0;
  const Range block_rows = blocks_of(n_, row_block_).front();
  const Range block_cols = blocks_of(m_, col_block_).front();
  const Packed x = pack(x_, block_rows, true, false, false);
  const std::vector<Packed> y = pack_cols(block_cols, true, false);
  while (elapsed < seconds) {
    const int64_t tiles = block_rows.tiles() * block_cols.tiles();
    for_each_task(tiles, work_of(block_rows, block_cols), new_scratch(), [&](int64_t tile, const Scratch& scratch) {
      const Range rows = block_rows.tile(tile / block_cols.tiles());
      const Range cols = block_cols.tile(tile % block_cols.tiles());
      multiply_dots(rows, cols, block_rows, block_cols, x, y, scratch.dots());
    });
    flops += 2.0 * static_cast<double>(block_rows.size()) * static_cast<double>(block_cols.size()) *
             static_cast<double>(features_);
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  return flops / elapsed;
}

#ifdef CONTRASTIVE_OPS_MATRIX_UNIT
// Whether the rows of an embedding [N, D] may go through the matrix unit as sums of bfloat16.
bool splits(const Tensor& embedding) {
  constexpr int64_t kValues = int64_t(1) << 18;  // that are looked at, and converted, at a time
  const int64_t n = embedding.size(0);
  const int64_t depth = embedding.size(1);
  const int64_t piece = std::max<int64_t>(1, kValues / depth);
  std::atomic<bool> result{true};
  for_each_task((n + piece - 1) / piece, kMoveCost * n * depth, [&](int64_t task) {
    const int64_t begin = task * piece;
    const Tensor rows = with_dense_vectors<float>(embedding.narrow(0, begin, std::min(piece, n - begin)));
    if (!matrix_unit::splits(rows.size(0), depth, rows.const_data_ptr<float>(), rows.stride(0))) {
      result = false;
    }
  });
  return result;
}

// The same of both sides, each vector of a tuple for its own.
bool splits(const SimilarityOptions& options) {
  std::vector<Tensor> embeddings{options.x};
  if (options.span.has_value()) {
    const std::vector<Tensor> vectors = options.y->unbind(1);
    embeddings.insert(embeddings.end(), vectors.begin(), vectors.end());
  } else if (options.y.has_value()) {
    embeddings.push_back(*options.y);
  }
  return std::all_of(embeddings.begin(), embeddings.end(), [](const Tensor& embedding) { return splits(embedding); });
}
#endif

// Calls f with the engine for the dtype of x and for this processor.
template <typename F>
auto with_engine(const SimilarityOptions& options, const F& f) {
  const c10::ScalarType dtype = options.x.scalar_type();
  if (dtype == at::kDouble) {
    return f(Engine<VectorProducts<double>>(options));
  }
#ifdef CONTRASTIVE_OPS_MATRIX_UNIT
  const BFloat16Unit unit = bfloat16_unit();
  if (dtype == at::kBFloat16 && unit == BFloat16Unit::matrix) {
    return f(Engine<BFloat16Products<1, BFloat16Unit::matrix>>(options));
  }
  if (dtype == at::kBFloat16 && unit == BFloat16Unit::vectors) {
    return f(Engine<BFloat16Products<1, BFloat16Unit::vectors>>(options));
  }
  if (unit == BFloat16Unit::matrix && splits(options)) {
    // not with tuples: the gradient of a volume is a small difference of coefficients
    if (dtype == at::kHalf && !options.span.has_value()) {
      return f(Engine<BFloat16Products<2, BFloat16Unit::matrix>>(options));
    }
    return f(Engine<BFloat16Products<3, BFloat16Unit::matrix>>(options));
  }
#endif
  return f(Engine<VectorProducts<float>>(options));
}

}  // namespace

SimilarityStatistics similarity_logsumexp(const SimilarityOptions& options, bool keep) {
  return with_engine(options, [&](auto engine) { return engine.forward(keep); });
}

SimilarityGradients similarity_logsumexp_backward(
    const SimilarityOptions& options,
    const SimilarityStatistics& statistics,
    const IncomingGradients& incoming,
    Needs needs) {
  return with_engine(options, [&](auto engine) { return engine.backward(statistics, incoming, needs); });
}

double tile_product_rate(const Tensor& x, const Tensor& y, double seconds) {
  TORCH_CHECK_VALUE(x.numel() > 0 && y.numel() > 0, "x and y must not be empty");
  SimilarityOptions options;
  options.x = x;
  options.y = y;
  return with_engine(options, [&](auto engine) { return engine.product_rate(seconds); });
}

}  // namespace contrastive_ops
