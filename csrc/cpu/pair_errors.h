// What pair_errors and dpo_loss share: the sums over images, and the residual times a factor of the image.
#pragma once

#include "blocks.h"

namespace dpo_fast::cpu {

constexpr int64_t kChunk = 4096;  // numbers of an image that are summed in float32

// First stage of the reduction: fills op.sums, an entry for each chunk. Images are cut by their size alone.
void sum_images(const PairErrors& op, int threads);

// Second stage: adds the chunks of an image in their order, in float64; writes the image's outputs.
ImageErrors finish_image(const PairErrors& op, int64_t image);

// out = factor * (policy - target), at most kChunk numbers
void scale_residual(Numbers policy, Numbers target, float factor, int64_t count, MutableNumbers out);

// grad = factor_of(image) * (policy - target)
template <typename FactorOf>
void scale_residuals(const PairErrorsGrad& op, int threads, const FactorOf& factor_of) {
  const int64_t chunks = ceil_div(op.numbers, kChunk);
  parallel_for(threads, 2 * op.pairs * chunks, [&](int64_t item) {
    const int64_t image = item / chunks, start = item % chunks * kChunk;
    const int64_t from = image * op.numbers + start, target = image % op.targets * op.numbers + start;
    scale_residual(
        at(op.policy, from), at(op.target, target), factor_of(image), std::min(kChunk, op.numbers - start),
        at(op.grad, from));
  });
}

}  // namespace dpo_fast::cpu
