// The pairs of a tile that may be among the best of their rows: most logits are turned away by one comparison of a row.
#pragma once

#include "vectors.h"

namespace contrastive_ops {
namespace CPU_CAPABILITY {
namespace {

// The finalizer of splitmix64.
inline uint64_t mixed(uint64_t bits) {
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
  return bits ^ (bits >> 31);
}

// keys = logits + Gumbel noise of the pairs, drawn by a counter: the same in any order of tiles.
template <typename T>
inline void add_noise(const Noise& noise, int64_t i, T* keys) {
  const uint64_t state = mixed(noise.seed);
  const uint64_t first = (static_cast<uint64_t>(noise.row + i) << 32) + static_cast<uint64_t>(noise.col) + 1;
  alignas(64) T uniform[kTile];
  for (int64_t j = 0; j < kTile; ++j) {
    const uint64_t hash = mixed(state + 0x9E3779B97F4A7C15u * (first + static_cast<uint64_t>(j)));
    uniform[j] = (static_cast<T>(static_cast<int32_t>(hash >> 41)) + T(0.5)) * T(0x1p-23);
  }
  for (int64_t j = 0; j < kTile; j += Vec<T>::size()) {
    const Vec<T> exponential = Vec<T>::loadu(uniform + j).log().neg();
    (Vec<T>::loadu(keys + j) - exponential.log()).store(keys + j);
  }
}

// Negative logits, where the smallest are sought; those of pairs that do not take part stay at -inf, below all others.
template <typename T>
inline Vec<T> reversed(Vec<T> logit) {
  const Vec<T> key = at::vec::maximum(logit.neg(), Vec<T>(std::numeric_limits<T>::lowest()));
  return Vec<T>::blendv(key, logit, logit == Vec<T>(-kInfinity<T>));
}

template <bool Stored, typename T>
void candidates_of(
    const Tile<T>& tile, const T* thresholds, bool largest, const Noise* noise, const Candidates<T>& candidates) {
  alignas(64) T keys[kTile];
  int32_t count = 0;
  for (int64_t i = 0; i < tile.rows; candidates.ends[i++] = count) {
    const LogitRow<Stored, T> row(tile, i);
    Vec<T> highest(-kInfinity<T>);
    for (int64_t j = 0; j < kTile; j += Vec<T>::size()) {
      const Vec<T> key = largest ? row.at(j) : reversed(row.at(j));
      key.store(keys + j);
      highest = at::vec::maximum(highest, key);
    }
    if (noise != nullptr) {
      add_noise(*noise, i, keys);
    } else if ((highest <= Vec<T>(thresholds[i])).zero_mask() == 0) {
      continue;
    }
    alignas(64) T values[kTile];
    for (int64_t j = 0; j < kTile; j += Vec<T>::size()) {
      row.at(j).store(values + j);
    }
    // written so that NaN is one of them
    for (int64_t j = 0; j < kTile; ++j) {
      if (!(keys[j] <= thresholds[i])) {
        candidates.values[count] = values[j];
        candidates.keys[count] = keys[j];
        candidates.cols[count] = static_cast<uint8_t>(j);
        ++count;
      }
    }
  }
}

template <typename T>
void candidates(
    const Tile<T>& tile, const T* thresholds, bool largest, const Noise* noise, const Candidates<T>& candidates) {
  with_stored(tile, [&](auto stored) { candidates_of<stored.value>(tile, thresholds, largest, noise, candidates); });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace contrastive_ops
