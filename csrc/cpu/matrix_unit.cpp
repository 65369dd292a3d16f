// Compiled for AVX-512 with BF16, and AMX, and called only where bfloat16_unit() says so: no header of ours with inline
// functions is included, as the linker could take what is compiled here for the same function elsewhere.

#include "matrix_unit.h"

#include <immintrin.h>

namespace contrastive_ops::matrix_unit {
namespace {

using c10::BFloat16;

constexpr int64_t kFragment = kFragmentRows * kFragmentDepth;
constexpr int64_t kLanes = 16;  // floats in a vector
constexpr int64_t kLine = 32;   // bfloat16 in a line of the cache

// Of the next panel, what is fetched beside the product of two fragments: all of it in the course of 8 x 2 of them.
template <int Parts>
constexpr int64_t kAhead = 2 * Parts * kFragment / 16;

constexpr int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// The first `count` of 16 lanes, for a count below 0 none.
inline __mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? __mmask16(0xffff) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

inline __m512 load(const float* source, __mmask16 lanes) {
  return _mm512_maskz_loadu_ps(lanes, source);
}

// A bfloat16 is the upper half of a float32.
inline __m512 widen(__m256i values) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

inline __m512 load(const BFloat16* source, __mmask16 lanes) {
  return widen(_mm256_maskz_loadu_epi16(lanes, source));
}

inline __m256i round(__m512 values) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
}

// Transposes 16 x 16 values of 32 bits: rows become columns by exchanging blocks of 1, 2, 4 and 8.
inline void transpose(__m512i (&rows)[16]) {
  __m512i other[16];
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    other[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    other[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    rows[4 * i] = _mm512_unpacklo_epi64(other[4 * i], other[4 * i + 2]);
    rows[4 * i + 1] = _mm512_unpackhi_epi64(other[4 * i], other[4 * i + 2]);
    rows[4 * i + 2] = _mm512_unpacklo_epi64(other[4 * i + 1], other[4 * i + 3]);
    rows[4 * i + 3] = _mm512_unpackhi_epi64(other[4 * i + 1], other[4 * i + 3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    other[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    other[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    other[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    other[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
  }
}

// The parts of 32 values as one row of the fragments of an a.
template <int Parts>
inline void store_parts(__m512 low, __m512 high, BFloat16* target) {
#pragma GCC unroll 3
  for (int part = 0; part < Parts; ++part) {
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
    _mm512_storeu_si512(target + part * kFragment, both);
    low = _mm512_sub_ps(low, widen(_mm512_castsi512_si256(both)));
    high = _mm512_sub_ps(high, widen(_mm512_extracti64x4_epi64(both, 1)));
  }
}

// Registers of the unit: 0 adds up, 1 holds a part of a, 2 one of b. More of them would save loads, but what is left of
// the eight when two threads share a core then lets no load run ahead.
inline void load_a(const BFloat16* a, int part) {
  _tile_loadd(1, a + part * kFragment, 64);
}

inline void load_b(const BFloat16* b, int part) {
  _tile_loadd(2, b + 2 * part * kFragment, 64);
}

inline void multiply_add() {
  _tile_dpbf16ps(0, 1, 2);
}

// The product of two fragments. With several parts every product but the first takes one new operand, and the largest
// comes last.
template <int Parts>
inline void multiply_parts(const BFloat16* a, const BFloat16* b) {
  load_a(a, 0);
  if constexpr (Parts == 3) {
    load_b(b, 2);
    multiply_add();
  }
  if constexpr (Parts >= 2) {
    load_b(b, 1);
    multiply_add();
    load_a(a, 1);
    multiply_add();
  }
  load_b(b, 0);
  if constexpr (Parts >= 2) {
    multiply_add();
  }
  if constexpr (Parts == 3) {
    load_a(a, 2);
    multiply_add();
  }
  if constexpr (Parts >= 2) {
    load_a(a, 0);
  }
  multiply_add();
}

// 16 rows of a times half a panel of b, over `count` fragments of the depth; those of a lie together block by block.
// Meanwhile `ahead` is fetched, which the next products take: a panel comes from the last-level cache.
template <int Parts>
inline void multiply_fragments(
    int64_t count,
    const BFloat16* a,
    int64_t a_block,
    const BFloat16* b,
    const BFloat16* ahead,
    int64_t rows,
    float* c,
    int64_t ldc,
    bool accumulate) {
  constexpr int64_t kTogether = kBlockDepth / kFragmentDepth;
  _tile_zero(0);
  for (int64_t begin = 0; begin < count; begin += kTogether, a += a_block) {
    for (int64_t l = begin; l < min(begin + kTogether, count); ++l) {
      multiply_parts<Parts>(a + (l - begin) * Parts * kFragment, b + l * 2 * Parts * kFragment);
#pragma GCC unroll 6
      for (int line = 0; line < kAhead<Parts> / kLine; ++line) {
        _mm_prefetch(ahead + l * kAhead<Parts> + line * kLine, _MM_HINT_T1);
      }
    }
  }
  if (!accumulate && rows == kFragmentRows) {
    _tile_stored(0, c, ldc * sizeof(float));
    return;
  }
  alignas(64) float sum[kFragmentRows * kLanes];
  _tile_stored(0, sum, kLanes * sizeof(float));
  for (int64_t i = 0; i < rows; ++i) {
    const __m512 part = _mm512_load_ps(sum + i * kLanes);
    float* target = c + i * ldc;
    _mm512_storeu_ps(target, accumulate ? _mm512_add_ps(_mm512_loadu_ps(target), part) : part);
  }
}

}  // namespace

void configure() {
  struct alignas(64) Configuration {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  // a constant: to GCC 12 the instruction reads 8 bytes, and what sets the others would be dropped
  static constexpr Configuration configuration = {1, 0, {}, {64, 64, 64}, {16, 16, 16}};
  _tile_loadconfig(&configuration);
}

void release() {
  _tile_release();
}

bool splits(int64_t rows, int64_t depth, const float* values, int64_t ld) {
  const __m512 highest = _mm512_set1_ps(0x1p127f);
  for (int64_t i = 0; i < rows; ++i, values += ld) {
    __m512 largest = _mm512_setzero_ps();
    __mmask16 inside = 0xffff;  // false for NaN
    for (int64_t l = 0; l < depth; l += kLanes) {
      const __m512 magnitude = _mm512_abs_ps(load(values + l, first_lanes(depth - l)));
      inside &= _mm512_cmp_ps_mask(magnitude, highest, _CMP_LE_OQ);
      largest = _mm512_max_ps(largest, magnitude);
    }
    const float of_row = _mm512_reduce_max_ps(largest);
    if (inside != 0xffff || (of_row != 0.0f && of_row < 0x1p-48f)) {
      return false;
    }
  }
  return true;
}

template <int Parts, typename Source>
void pack_rows(int64_t rows, int64_t depth, const Source* source, int64_t ld, int64_t width, Element<Parts>* target) {
  for (int64_t i = 0; i < rows; i += kFragmentRows) {
    BFloat16* strip = target[i * width].parts;
    for (int64_t l = 0; l < depth; l += kFragmentDepth) {
      const __mmask16 lanes[2] = {first_lanes(depth - l), first_lanes(depth - l - kLanes)};
      BFloat16* fragments = strip + l * kFragmentRows * Parts;
      for (int64_t r = 0; r < kFragmentRows; ++r) {
        const Source* row = source + (i + r) * ld + l;
        __m512 low = _mm512_setzero_ps();
        __m512 high = _mm512_setzero_ps();
        if (i + r < rows) {
          low = load(row, lanes[0]);
          high = lanes[1] == 0 ? high : load(row + kLanes, lanes[1]);
        }
        store_parts<Parts>(low, high, fragments + r * kFragmentDepth);
      }
    }
  }
}

template <int Parts>
void pack_transposed(
    int64_t depth, int64_t cols, const float* source, int64_t ld, int64_t width, Element<Parts>* target) {
  for (int64_t j = 0; j < cols; j += kFragmentRows) {
    const __mmask16 lanes = first_lanes(cols - j);
    BFloat16* strip = target[j * width].parts;
    for (int64_t l = 0; l < depth; l += kFragmentDepth) {
      __m512i halves[2][kLanes];
      for (int64_t half = 0; half < 2; ++half) {
        for (int64_t r = 0; r < kLanes; ++r) {
          const int64_t row = l + half * kLanes + r;
          halves[half][r] =
              row < depth ? _mm512_castps_si512(load(source + row * ld + j, lanes)) : _mm512_setzero_si512();
        }
        transpose(halves[half]);
      }
      BFloat16* fragments = strip + l * kFragmentRows * Parts;
      for (int64_t r = 0; r < kFragmentRows; ++r) {
        store_parts<Parts>(
            _mm512_castsi512_ps(halves[0][r]), _mm512_castsi512_ps(halves[1][r]), fragments + r * kFragmentDepth);
      }
    }
  }
}

template <int Parts, typename Source>
void pack_depth_panel(int64_t rows, int64_t depth, const Source* source, int64_t ld, Element<Parts>* panel) {
  alignas(64) Element<Parts> fragments[kFragment];
  for (int64_t l = 0; l < depth; l += kFragmentDepth) {
    for (int64_t half = 0; half < 2; ++half) {
      // a fragment of an a, its pairs transposed, is one of a b
      const int64_t first = half * kFragmentRows;
      const int64_t count = rows <= first ? 0 : min(rows - first, kFragmentRows);
      if (count > 0) {
        pack_rows(count, min(depth - l, kFragmentDepth), source + first * ld + l, ld, kFragmentDepth, fragments);
      }
      for (int part = 0; part < Parts; ++part) {
        __m512i pairs[kFragmentRows];
        for (int64_t r = 0; r < kFragmentRows; ++r) {
          pairs[r] = count == 0 ? _mm512_setzero_si512()
                                : _mm512_load_si512(fragments[0].parts + part * kFragment + r * kFragmentDepth);
        }
        transpose(pairs);
        BFloat16* target = panel[l * kPanel].parts + (2 * part + half) * kFragment;
        for (int64_t r = 0; r < kFragmentRows; ++r) {
          _mm512_storeu_si512(target + r * kFragmentDepth, pairs[r]);
        }
      }
    }
  }
}

template <int Parts, typename Source>
void pack_feature_panel(int64_t depth, int64_t cols, const Source* source, int64_t ld, Element<Parts>* panel) {
  for (int64_t l = 0; l < depth; l += kFragmentDepth) {
    for (int64_t pair = 0; pair < kFragmentDepth / 2; ++pair) {
      for (int64_t half = 0; half < 2; ++half) {
        const __mmask16 lanes = first_lanes(cols - half * kLanes);
        __m512 rest[2];
        for (int64_t side = 0; side < 2; ++side) {
          const int64_t row = l + 2 * pair + side;
          rest[side] = row < depth && lanes != 0 ? load(source + row * ld + half * kLanes, lanes) : _mm512_setzero_ps();
        }
#pragma GCC unroll 3
        for (int part = 0; part < Parts; ++part) {
          const __m512i low = _mm512_cvtepu16_epi32(round(rest[0]));
          const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(round(rest[1])), 16);
          BFloat16* target = panel[l * kPanel].parts + (2 * part + half) * kFragment + pair * kFragmentDepth;
          _mm512_storeu_si512(target, _mm512_or_si512(low, high));
          rest[0] = _mm512_sub_ps(rest[0], _mm512_castsi512_ps(_mm512_slli_epi32(low, 16)));
          rest[1] = _mm512_sub_ps(rest[1], _mm512_castsi512_ps(high));
        }
      }
    }
  }
}

namespace {

// As deep as keeps a panel in the first-level cache for all rows: 24 KB, with one part 16 KB.
template <int Parts>
constexpr int64_t kDepth = (Parts == 1 ? 2 : 1) * kBlockDepth;

constexpr int64_t fragments(int64_t depth) {
  return (depth + kFragmentDepth - 1) / kFragmentDepth;
}

inline __m512bh load_pairs(const BFloat16* pairs) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(pairs));
}

inline __m512bh broadcast_pair(const BFloat16* pair) {
  int32_t bits;
  __builtin_memcpy(&bits, pair, sizeof(bits));
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits));
}

// The first `rows` of `Count` rows of c, a panel wide.
template <int Count>
inline void store_rows(const __m512 (&sum)[Count][2], int64_t rows, float* c, int64_t ldc, bool accumulate) {
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      float* target = c + i * ldc + half * kLanes;
      if (i < rows) {
        _mm512_storeu_ps(target, accumulate ? _mm512_add_ps(_mm512_loadu_ps(target), sum[i][half]) : sum[i][half]);
      }
    }
  }
}

}  // namespace

template <int Parts>
void multiply(
    int64_t m,
    int64_t k,
    const Element<Parts>* a,
    int64_t a_rows,
    int64_t a_block,
    const Element<Parts>* b,
    float* c,
    int64_t ldc,
    bool accumulate) {
  for (int64_t l = 0; l < k; l += kDepth<Parts>) {
    const int64_t count = fragments(min(k - l, kDepth<Parts>));
    const BFloat16* panel = b[l * kPanel].parts;
    const BFloat16* ahead = b[(l + kDepth<Parts>)*kPanel].parts;
    for (int64_t i = 0; i < m; i += kFragmentRows) {
      for (int64_t half = 0; half < 2; ++half, ahead += count * kAhead<Parts>) {
        multiply_fragments<Parts>(
            count,
            a[l / kBlockDepth * a_block + i / kFragmentRows * a_rows].parts,
            a_block * Parts,
            panel + half * kFragment,
            ahead,
            min(m - i, kFragmentRows),
            c + i * ldc + half * kLanes,
            ldc,
            accumulate || l > 0);
      }
    }
  }
}

void multiply_on_vectors(
    int64_t m,
    int64_t k,
    const Element<1>* a,
    int64_t a_rows,
    int64_t a_block,
    const Element<1>* b,
    float* c,
    int64_t ldc,
    bool accumulate) {
  constexpr int kRows = 8;  // with two vectors of b: 16 sums
  for (int64_t begin = 0; begin < k; begin += kDepth<1>) {
    const int64_t count = fragments(min(k - begin, kDepth<1>));
    for (int64_t i = 0; i < m; i += kRows) {
      const int64_t inside = i % kFragmentRows * kFragmentDepth;
      __m512 sum[kRows][2] = {};
      for (int64_t f = 0; f < count; ++f) {
        const int64_t l = begin + f * kFragmentDepth;
        const int64_t place = l / kBlockDepth * a_block + i / kFragmentRows * a_rows + l % kBlockDepth * kFragmentRows;
        const BFloat16* a_pairs = a[place].parts + inside;
        const BFloat16* b_pairs = b[l * kPanel].parts;
        for (int64_t pair = 0; pair < kFragmentDepth / 2; ++pair) {
          const __m512bh columns[2] = {
              load_pairs(b_pairs + pair * kFragmentDepth), load_pairs(b_pairs + kFragment + pair * kFragmentDepth)};
#pragma GCC unroll 8
          for (int row = 0; row < kRows; ++row) {
            const __m512bh of_row = broadcast_pair(a_pairs + row * kFragmentDepth + 2 * pair);
            sum[row][0] = _mm512_dpbf16_ps(sum[row][0], of_row, columns[0]);
            sum[row][1] = _mm512_dpbf16_ps(sum[row][1], of_row, columns[1]);
          }
        }
      }
      store_rows(sum, m - i, c + i * ldc, ldc, accumulate || begin > 0);
    }
  }
}

template void pack_rows(int64_t, int64_t, const float*, int64_t, int64_t, Element<1>*);
template void pack_rows(int64_t, int64_t, const float*, int64_t, int64_t, Element<2>*);
template void pack_rows(int64_t, int64_t, const float*, int64_t, int64_t, Element<3>*);
template void pack_rows(int64_t, int64_t, const BFloat16*, int64_t, int64_t, Element<1>*);
template void pack_transposed(int64_t, int64_t, const float*, int64_t, int64_t, Element<1>*);
template void pack_transposed(int64_t, int64_t, const float*, int64_t, int64_t, Element<2>*);
template void pack_transposed(int64_t, int64_t, const float*, int64_t, int64_t, Element<3>*);
template void pack_depth_panel(int64_t, int64_t, const float*, int64_t, Element<2>*);
template void pack_depth_panel(int64_t, int64_t, const float*, int64_t, Element<3>*);
template void pack_depth_panel(int64_t, int64_t, const BFloat16*, int64_t, Element<1>*);
template void pack_feature_panel(int64_t, int64_t, const float*, int64_t, Element<2>*);
template void pack_feature_panel(int64_t, int64_t, const float*, int64_t, Element<3>*);
template void pack_feature_panel(int64_t, int64_t, const BFloat16*, int64_t, Element<1>*);
template void multiply(int64_t, int64_t, const Element<1>*, int64_t, int64_t, const Element<1>*, float*, int64_t, bool);
template void multiply(int64_t, int64_t, const Element<2>*, int64_t, int64_t, const Element<2>*, float*, int64_t, bool);
template void multiply(int64_t, int64_t, const Element<3>*, int64_t, int64_t, const Element<3>*, float*, int64_t, bool);

}  // namespace contrastive_ops::matrix_unit
