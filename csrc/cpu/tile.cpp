// The tile functions of tile.h, written once over at::vec::Vectorized and compiled per instruction set.
//
// Everything is in the namespace CPU_CAPABILITY: the linker must never take code of one instruction set for another.

#include "tile.h"
#include "tile/expectation.h"
#include "tile/logits.h"
#include "tile/logsumexp.h"
#include "tile/products.h"
#include "tile/row_vectors.h"
#include "tile/spans.h"
#include "tile/sum.h"
#include "tile/topk.h"

namespace contrastive_ops {
namespace CPU_CAPABILITY {
namespace {

#define CONTRASTIVE_OPS_STRING_(x) #x
#define CONTRASTIVE_OPS_STRING(x) CONTRASTIVE_OPS_STRING_(x)

template <typename T>
constexpr TileKernels<T> kKernels = {
    CONTRASTIVE_OPS_STRING(CPU_CAPABILITY),
    kPanel<T>,
    multiply<T>,
    transpose<T>,
    logits<T>,
    mask_ids<T>,
    mask_ceilings<T>,
    reduce<T>,
    sum<T>,
    means<T>,
    candidates<T>,
    fold<T>,
    fold_means<T>,
    coefficients<T>,
    sum_coefficients<T>,
    softmax<T>,
    mixed_coefficients<T>,
    tilted_coefficients<T>,
    dot_products<T>,
    combine<T>,
    distances<T>,
    spread<T>,
};

}  // namespace

extern const TileKernels<float> float_kernels = kKernels<float>;
extern const TileKernels<double> double_kernels = kKernels<double>;

}  // namespace CPU_CAPABILITY
}  // namespace contrastive_ops
