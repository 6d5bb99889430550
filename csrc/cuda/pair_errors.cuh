// What pair_errors and dpo_loss share: the sums over images, and the residual times a factor of the image.
#pragma once

#include "vectors.cuh"

namespace dpo_fast::cuda {

constexpr int64_t kTile = kThreads * kVector;  // numbers that a block takes at a time
constexpr int64_t kMaxChunks = 128;

// An image's sums come from so many blocks; block c takes tiles c, c + chunks, ... So the order of the additions
// depends on the image's size alone, not on the GPU.
struct Cut {
  explicit Cut(int64_t numbers) : chunks(ceil_div(numbers, kTile)), mean(one_over(numbers)) {
    if (chunks > kMaxChunks) chunks = kMaxChunks;
  }
  int64_t chunks;
  double mean;
};

// First stage: op.sums [3][chunks][2B]. One launch, of pair_errors.cu.
void launch_sum_images(const PairErrors& op, const Cut& cut, cudaStream_t stream);

// Second stage: adds the chunks of an image in their order, in float64; writes the image's outputs.
__device__ __forceinline__ ImageErrors finish_image(const PairErrors& op, const Cut& cut, int64_t image) {
  const int64_t chunks = cut.chunks;
  const int64_t images = 2 * op.pairs;
  ImageSums sums = {0, 0, 0};
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    sums.policy += op.sums[chunk * images + image];
    sums.ref += op.sums[(chunks + chunk) * images + image];
    sums.delta += op.sums[(2 * chunks + chunk) * images + image];
  }
  const ImageErrors errors = image_errors(op, cut.mean, image, sums);
  op.policy_error_out[image] = errors.policy;
  op.ref_error_out[image] = errors.ref;
  if (op.delta_out) op.delta_out[image] = errors.delta;
  return errors;
}

// grad = factor_of(image) * (policy - target)
template <typename FactorOf>
__device__ __forceinline__ void scale_residuals(const PairErrorsGrad& op, FactorOf factor_of) {
  const int64_t start = blockIdx.x * kTile + threadIdx.x * kVector;
  if (start >= op.numbers) return;
  for (int64_t image = blockIdx.y; image < 2 * op.pairs; image += gridDim.y) {
    const Numbers policy = at(op.policy, image * op.numbers);
    const Numbers target = at(op.target, (image < op.targets ? image : image - op.targets) * op.numbers);
    const MutableNumbers grad = at(op.grad, image * op.numbers);
    const Raw raw_policy = load(policy, start, op.numbers, is_aligned(policy.data));
    const Raw raw_target = load(target, start, op.numbers, is_aligned(target.data));
    const float factor = factor_of(image);
    Vector out = decode(raw_policy, policy.dtype);
    const Vector t = decode(raw_target, target.dtype);
#pragma unroll
    for (int i = 0; i < kVector; ++i) out.x[i] = factor * (out.x[i] - t.x[i]);
    store(grad, start, op.numbers, is_aligned(grad.data), out);
  }
}

inline dim3 residual_grid(const PairErrorsGrad& op) {
  return dim3(static_cast<unsigned>(ceil_div(op.numbers, kTile)), grid_rows(2 * op.pairs));
}

}  // namespace dpo_fast::cuda
