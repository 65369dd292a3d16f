// Products on the matrix unit of x86 processors (AMX), which multiplies bfloat16 and adds in float32; and of the same
// operands on vector units that do (AVX-512 BF16), for bfloat16 where there is no matrix unit.
//
// A bfloat16 is one part. A float32 is three, x = x_0 + x_1 + x_2 of 8 bits each, without an error, and of the nine
// products of their parts six are taken: x_0 y_0, x_0 y_1, x_1 y_0, x_1 y_1, x_0 y_2, x_2 y_0. The others are together
// below 2^-24 of the product, so that the sum has the error of float32. A float16 is two parts without an error, whose
// four products are all taken; of the coefficients of its gradients two parts leave 2^-17 off.
//
// The unit takes what is below the normal numbers, 2^-126, as 0: parts, products and sums. Beside values that count for
// more it is nothing, so splits() asks of each row of an embedding that its largest value is no smaller than 2^-48.
// Coefficients of gradients are not asked: those below 2^-100 may lose digits, and infinite ones become NaN.
//
// A fragment is what a register of the unit holds, 1 KB: of an a 16 rows x 32 of the depth; of a b 32 of the depth x 16
// columns, where the two values of a pair along the depth lie side by side. Operands are fragments, padded with zeros:
//
//   rows    [rows / 16][depth / 32][parts] fragments of an a
//   panel   [depth / 32][parts][2] fragments of a b: 32 columns
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace contrastive_ops::matrix_unit {

constexpr int64_t kFragmentRows = 16;
constexpr int64_t kFragmentDepth = 32;
constexpr int64_t kPanel = 32;
constexpr int64_t kBlockDepth = 128;  // of an a, whose fragments lie together

// One element of an operand, as far as addresses go: the parts of a fragment lie behind one another.
template <int Parts>
struct Element {
  c10::BFloat16 parts[Parts];
};

// The configuration of the unit belongs to the thread, between these two.
void configure();
void release();

// Whether every row of a [rows, depth] matrix is 0 or has its largest magnitude in [2^-48, 2^127].
bool splits(int64_t rows, int64_t depth, const float* values, int64_t ld);

// Rows of a [rows, depth] matrix as the rows of an a. The fragments of 16 rows begin every `width` of the depth.
template <int Parts, typename Source>
void pack_rows(int64_t rows, int64_t depth, const Source* source, int64_t ld, int64_t width, Element<Parts>* target);

// Columns of a [depth, cols] matrix as the rows of an a.
template <int Parts>
void pack_transposed(
    int64_t depth, int64_t cols, const float* source, int64_t ld, int64_t width, Element<Parts>* target);

// A panel of the transpose: at most 32 rows of a [rows, depth] matrix.
template <int Parts, typename Source>
void pack_depth_panel(int64_t rows, int64_t depth, const Source* source, int64_t ld, Element<Parts>* panel);

// A panel of the matrix: at most 32 columns of a [depth, cols] matrix.
template <int Parts, typename Source>
void pack_feature_panel(int64_t depth, int64_t cols, const Source* source, int64_t ld, Element<Parts>* panel);

// c[m, 32] = (accumulate ? c : 0) + a b. The fragments of 16 rows of a begin every `a_rows`, those of a block of the
// depth every `a_block`. From k on to the next fragment b is 0 and a finite; rows of a from m on are not looked at.
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
    bool accumulate);

// The same for one part on the vector units, without configure() and release().
void multiply_on_vectors(
    int64_t m,
    int64_t k,
    const Element<1>* a,
    int64_t a_rows,
    int64_t a_block,
    const Element<1>* b,
    float* c,
    int64_t ldc,
    bool accumulate);

}  // namespace contrastive_ops::matrix_unit
