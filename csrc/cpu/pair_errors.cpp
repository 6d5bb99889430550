// pair_errors on the CPU: float32 sums in sixteen lanes over a tile, lanes and tiles combined in a fixed order.
#include "pair_errors.h"

namespace dpo_fast::cpu {
namespace {

constexpr int64_t kLanes = 16;

struct Lanes {
  float lane[kLanes];
};

float sum_of(Lanes x) {
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) x.lane[i] += x.lane[i + width];
  }
  return x.lane[0];
}

// The sums of policy, ref and delta over a tile. Without ref predictions the last two are zero and not used.
DPO_FAST_CLONES
void sum_tile(ConstArray policy, ConstArray ref, ConstArray target, int64_t count, Lanes* sums) {
  Lanes policy_sum = {}, ref_sum = {}, delta_sum = {};
  float p[kBlock], r[kBlock], t[kBlock];
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t block = std::min(kBlock, count - start), padded = ceil_div(block, kLanes) * kLanes;
    decode(at(policy, start), 1, block, p);
    decode(at(target, start), 1, block, t);
    if (ref.data) decode(at(ref, start), 1, block, r);
    for (int64_t i = block; i < padded; ++i) p[i] = r[i] = t[i] = 0.0f;  // padding adds zeros to the sums
    if (ref.data) {
      for (int64_t i = 0; i < padded; i += kLanes) {
        for (int64_t k = 0; k < kLanes; ++k) {
          add_terms(p[i + k], r[i + k], t[i + k], policy_sum.lane[k], ref_sum.lane[k], delta_sum.lane[k]);
        }
      }
    } else {
      for (int64_t i = 0; i < padded; i += kLanes) {
        for (int64_t k = 0; k < kLanes; ++k) {
          const float residual = p[i + k] - t[i + k];
          policy_sum.lane[k] += residual * residual;
        }
      }
    }
  }
  sums[0] = policy_sum;
  sums[1] = ref_sum;
  sums[2] = delta_sum;
}

}  // namespace

DPO_FAST_CLONES
void scale_residual(ConstArray policy, ConstArray target, float factor, int64_t count, MutableArray out) {
  float p[kBlock], t[kBlock];
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t block = std::min(kBlock, count - start);
    decode(at(policy, start), 1, block, p);
    decode(at(target, start), 1, block, t);
    for (int64_t i = 0; i < block; ++i) p[i] = factor * (p[i] - t[i]);
    encode(p, 1, block, at(out, start));
  }
}

int64_t pair_sums_floats(int64_t images, int64_t elements) { return 3 * images * ceil_div(elements, kTile); }

void sum_images(const PairErrors& op, int threads) {
  const int64_t tiles = ceil_div(op.elements, kTile);
  parallel_for(threads, 2 * op.pairs * tiles, [&](int64_t item) {
    const int64_t image = item / tiles, start = item % tiles * kTile;
    const int64_t from = image * op.elements + start, target = image % op.targets * op.elements + start;
    Lanes sums[3];
    sum_tile(
        at(op.policy, from), op.ref.data ? at(op.ref, from) : op.ref, at(op.target, target),
        std::min(kTile, op.elements - start), sums);
    for (int64_t k = 0; k < 3; ++k) op.sums[3 * item + k] = sum_of(sums[k]);
  });
}

ImageErrors finish_image(const PairErrors& op, int64_t image) {
  const int64_t tiles = ceil_div(op.elements, kTile);
  ImageSums sums = {0, 0, 0};
  for (int64_t item = image * tiles; item < (image + 1) * tiles; ++item) {
    sums.policy += op.sums[3 * item];
    sums.ref += op.sums[3 * item + 1];
    sums.delta += op.sums[3 * item + 2];
  }
  const ImageErrors errors = image_errors(op, one_over(op.elements), image, sums);
  op.policy_error_out[image] = errors.policy;
  op.ref_error_out[image] = errors.ref;
  if (op.error_delta_out) op.error_delta_out[image] = errors.delta;
  return errors;
}

void pair_errors(const PairErrors& op, int threads) {
  sum_images(op, threads);
  for (int64_t image = 0; image < 2 * op.pairs; ++image) finish_image(op, image);
}

void pair_errors_grad(const PairErrorsGrad& op, int threads) {
  const float mean = two_over(op.elements);
  scale_residuals(op, threads, [&](int64_t image) { return op.grad_error[image] * mean; });
}

}  // namespace dpo_fast::cpu
