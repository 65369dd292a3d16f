#include "choose_products.h"
#include "memory.h"
#include "tasks.h"

#include <algorithm>
#include <atomic>
#include <vector>

namespace contrastive_ops {
namespace {

using at::Tensor;

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

// The same of all sides, each vector of a tuple for its own.
bool splits(const Problem& problem) {
  std::vector<Tensor> embeddings;
  for (const Form* form :
       {&problem.pairs, problem.guide ? &*problem.guide : nullptr, problem.teacher ? &*problem.teacher : nullptr}) {
    if (form == nullptr) {
      continue;
    }
    embeddings.push_back(form->x);
    if (form->span.has_value()) {
      const std::vector<Tensor> vectors = form->y->unbind(1);
      embeddings.insert(embeddings.end(), vectors.begin(), vectors.end());
    } else if (form->y.has_value() && !form->y->is_same(form->x)) {
      embeddings.push_back(*form->y);
    }
  }
  return std::all_of(embeddings.begin(), embeddings.end(), [](const Tensor& embedding) { return splits(embedding); });
}
#endif

}  // namespace

Unit choose_unit(const Problem& problem) {
  const c10::ScalarType dtype = problem.pairs.x.scalar_type();
  if (dtype == at::kDouble) {
    return Unit::float64;
  }
#ifdef CONTRASTIVE_OPS_MATRIX_UNIT
  const BFloat16Unit unit = bfloat16_unit();
  if (dtype == at::kBFloat16 && unit != BFloat16Unit::none) {
    return unit == BFloat16Unit::matrix ? Unit::bfloat16_matrix : Unit::bfloat16_vectors;
  }
  if (unit == BFloat16Unit::matrix && splits(problem)) {
    // not with tuples: the gradient of a volume is a small difference of coefficients
    return dtype == at::kHalf && !problem.pairs.span.has_value() ? Unit::float16_matrix : Unit::float32_matrix;
  }
#endif
  return Unit::float32;
}

}  // namespace contrastive_ops
