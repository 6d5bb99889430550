// dpo_loss on CUDA: the sums of pair_errors, then all pairs in one thread block; the backward is one launch.
#include "pair_errors.cuh"

namespace dpo_fast::cuda {
namespace {

// Runs as one thread block: computes the margins and losses, and sums the losses in float64 by a tree over threads.
__global__ void __launch_bounds__(kThreads) finish_loss(
    const DPOLoss op, const Partition partition, const double mean) {
  __shared__ double partial[kThreads];
  const int64_t pairs = op.errors.pairs;
  double loss = 0;
  for (int64_t pair = threadIdx.x; pair < pairs; pair += kThreads) {
    const ImageErrors chosen = finish_image(op.errors, partition, pair);
    const ImageErrors rejected = finish_image(op.errors, partition, pairs + pair);
    const float margin = pair_margin(chosen.delta, rejected.delta, op.beta);
    op.margin[pair] = margin;
    loss += pair_loss(op, pair, margin);
  }
  partial[threadIdx.x] = loss;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) partial[threadIdx.x] += partial[threadIdx.x + width];
  }
  if (threadIdx.x == 0) *op.loss = static_cast<float>(partial[0] * mean);
}

__global__ void __launch_bounds__(kThreads) loss_grad(const DPOLossGrad op, const float scale, const float mean) {
  scale_residuals(op.errors, [&](int64_t image) { return grad_error_of(op, scale, image) * mean; });
}

}  // namespace

void preload_dpo_loss() { preload(finish_loss, loss_grad); }

void dpo_loss(const DPOLoss& op, Stream where) {
  const OnDevice on(where.device);
  const cudaStream_t stream = static_cast<cudaStream_t>(where.stream);
  const Partition partition(op.errors.elements);
  launch_sum_images(op.errors, partition, stream);
  finish_loss<<<1, kThreads, 0, stream>>>(op, partition, one_over(op.errors.pairs));
  check(cudaGetLastError());
}

void dpo_loss_grad(const DPOLossGrad& op, Stream where) {
  const OnDevice on(where.device);
  const float scale = error_scale(op), mean = two_over(op.errors.elements);
  loss_grad<<<residual_grid(op.errors), kThreads, 0, static_cast<cudaStream_t>(where.stream)>>>(op, scale, mean);
  check(cudaGetLastError());
}

}  // namespace dpo_fast::cuda
