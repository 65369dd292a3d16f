// A block of the plane, and the order of its tiles.
#pragma once

#include "ranges.h"

#include <c10/util/irange.h>

#include <cstdint>
#include <vector>

namespace contrastive_ops {

// What a tile above, on, or below the diagonal contributes to.
enum class Part : uint8_t { nothing, rows, both };

struct Block {
  Range rows;
  Range cols;
  bool mirrored;               // self-similarity: tiles below the diagonal are left out
  std::vector<Part> part;      // of each tile, row by row
  std::vector<int64_t> place;  // among the kept dots: the number of tiles visited before it

  int64_t tiles() const {
    return static_cast<int64_t>(part.size());
  }
  Range rows_of(int64_t tile) const {
    return rows.tile(tile / cols.tiles());
  }
  Range cols_of(int64_t tile) const {
    return cols.tile(tile % cols.tiles());
  }
  bool diagonal() const {
    return mirrored && rows == cols;
  }
  bool empty() const {
    return std::all_of(part.begin(), part.end(), [](Part of_tile) { return of_tile == Part::nothing; });
  }

  // to_rows(range, tile) for the tiles that contribute to their rows, to_cols likewise, in a fixed order.
  template <typename Rows, typename Cols>
  void for_each_contribution(const Rows& to_rows, const Cols& to_cols) const {
    for (const auto tile : c10::irange(tiles())) {
      if (part[tile] != Part::nothing) {
        to_rows(rows_of(tile), tile);
      }
      if (part[tile] == Part::both) {
        to_cols(cols_of(tile), tile);
      }
    }
  }
};

// What the tiles of a block give: `count` vectors each over its 128 rows, and as many over its columns.
template <typename T>
class Partials {
 public:
  Partials(int64_t count, bool rows, bool cols) : count_(count), to_rows_(rows), to_cols_(cols) {}

  void begin(const Block& block) {
    const int64_t size = block.tiles() * count_ * kTile;
    rows_ = Vector<T>(to_rows_ ? size : 0, T(0));
    cols_ = Vector<T>(to_cols_ ? size : 0, T(0));
  }
  // Null for a direction that is not asked for.
  T* rows(int64_t tile, int64_t k) {
    return rows_.at((tile * count_ + k) * kTile);
  }
  T* cols(int64_t tile, int64_t k) {
    return cols_.at((tile * count_ + k) * kTile);
  }

 private:
  int64_t count_;
  bool to_rows_;
  bool to_cols_;
  Vector<T> rows_;
  Vector<T> cols_;
};

}  // namespace contrastive_ops
