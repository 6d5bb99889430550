// What pair_errors and dpo_loss share: the sums over images, and the residual times a factor of the image.
#pragma once

#include "blocks.h"

namespace dpo_fast::cpu {

constexpr int64_t kTile = 4096;  // elements of an image summed in float32

// First stage of the reduction: fills op.sums, three sums per tile. How an image is split depends only on its size.
void sum_images(const PairErrors& op, int threads);

// Second stage: adds an image's tiles in order, in float64, and writes the image's outputs.
ImageErrors finish_image(const PairErrors& op, int64_t image);

// out = factor * (policy - target), for at most kTile elements
void scale_residual(ConstArray policy, ConstArray target, float factor, int64_t count, MutableArray out);

// grad = factor_of(image) * (policy - target)
template <typename FactorOf>
void scale_residuals(const PairErrorsGrad& op, int threads, const FactorOf& factor_of) {
  const int64_t tiles = ceil_div(op.elements, kTile);
  parallel_for(threads, 2 * op.pairs * tiles, [&](int64_t item) {
    const int64_t image = item / tiles, start = item % tiles * kTile;
    const int64_t from = image * op.elements + start, target = image % op.targets * op.elements + start;
    scale_residual(
        at(op.policy, from), at(op.target, target), factor_of(image), std::min(kTile, op.elements - start),
        at(op.grad, from));
  });
}

}  // namespace dpo_fast::cpu
