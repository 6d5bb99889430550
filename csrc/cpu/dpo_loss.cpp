// dpo_loss on the CPU: the sums of pair_errors in parallel, then the few operations per pair on one thread.
#include "pair_errors.h"

namespace dpo_fast::cpu {

void dpo_loss(const DPOLoss& op, int threads) {
  sum_images(op.errors, threads);
  const int64_t pairs = op.errors.pairs;
  double loss = 0;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const ImageErrors chosen = finish_image(op.errors, pair), rejected = finish_image(op.errors, pairs + pair);
    op.margin[pair] = pair_margin(chosen.delta, rejected.delta, op.beta);
    loss += pair_loss(op, pair, op.margin[pair]);
  }
  *op.loss = static_cast<float>(loss * one_over(pairs));
}

void dpo_loss_grad(const DPOLossGrad& op, int threads) {
  const float scale = error_scale(op), mean = two_over(op.errors.elements);
  scale_residuals(op.errors, threads, [&](int64_t image) { return grad_error_of(op, scale, image) * mean; });
}

}  // namespace dpo_fast::cpu
