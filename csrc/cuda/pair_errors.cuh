// What pair_errors and dpo_loss share: the sums over images, and the residual times a factor of the image.
#pragma once

#include "vectors.cuh"

namespace dpo_fast::cuda {

constexpr int64_t kTile = kThreads * kVector;  // elements that a thread block processes at a time
constexpr int64_t kMaxParts = 128;

// How an image is split over thread blocks: part p sums tiles p, p + parts, ..., so the order of the additions depends
// only on the image's size, not on the GPU.
struct Partition {
  explicit Partition(int64_t elements) : parts(ceil_div(elements, kTile)), mean(one_over(elements)) {
    if (parts > kMaxParts) parts = kMaxParts;
  }
  int64_t parts;
  double mean;
};

// First stage: fills op.sums [3][parts][2B] in one launch; defined in pair_errors.cu.
void launch_sum_images(const PairErrors& op, const Partition& partition, cudaStream_t stream);

// Second stage: adds an image's parts in order, in float64, and writes the image's outputs.
__device__ __forceinline__ ImageErrors finish_image(const PairErrors& op, const Partition& partition, int64_t image) {
  const int64_t parts = partition.parts;
  const int64_t images = 2 * op.pairs;
  ImageSums sums = {0, 0, 0};
  for (int64_t part = 0; part < parts; ++part) {
    sums.policy += op.sums[part * images + image];
    sums.ref += op.sums[(parts + part) * images + image];
    sums.delta += op.sums[(2 * parts + part) * images + image];
  }
  const ImageErrors errors = image_errors(op, partition.mean, image, sums);
  op.policy_error_out[image] = errors.policy;
  op.ref_error_out[image] = errors.ref;
  if (op.error_delta_out) op.error_delta_out[image] = errors.delta;
  return errors;
}

// grad = factor_of(image) * (policy - target)
template <typename FactorOf>
__device__ __forceinline__ void scale_residuals(const PairErrorsGrad& op, FactorOf factor_of) {
  const int64_t start = blockIdx.x * kTile + threadIdx.x * kVector;
  if (start >= op.elements) return;
  for (int64_t image = blockIdx.y; image < 2 * op.pairs; image += gridDim.y) {
    const ConstArray policy = at(op.policy, image * op.elements);
    const ConstArray target = at(op.target, (image < op.targets ? image : image - op.targets) * op.elements);
    const MutableArray grad = at(op.grad, image * op.elements);
    const Raw raw_policy = load(policy, start, op.elements, is_aligned(policy.data));
    const Raw raw_target = load(target, start, op.elements, is_aligned(target.data));
    const float factor = factor_of(image);
    Vector out = decode(raw_policy, policy.dtype);
    const Vector t = decode(raw_target, target.dtype);
#pragma unroll
    for (int i = 0; i < kVector; ++i) out.x[i] = factor * (out.x[i] - t.x[i]);
    store(grad, start, op.elements, is_aligned(grad.data), out);
  }
}

inline dim3 residual_grid(const PairErrorsGrad& op) {
  return dim3(static_cast<unsigned>(ceil_div(op.elements, kTile)), grid_rows(2 * op.pairs));
}

}  // namespace dpo_fast::cuda
