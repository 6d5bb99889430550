// noise_pair on the CPU: blocks of pixels, four channels at a time. Nothing is summed, so any split gives equal bits.
#include "blocks.h"

namespace dpo_fast::cpu {
namespace {

constexpr int64_t kTilePixels = kBlock / 4;

// Draws the noise of four channels at `count` pixels: channel k of pixel i goes to noise[k * kTilePixels + i] or,
// interleaved, to noise[4 * i + k].
DPO_FAST_CLONES
void draw_noise(
    uint64_t seed, uint64_t pair_id, uint64_t draw, uint32_t first, uint32_t step, int64_t count, bool interleave,
    float* noise) {
  float planes[kBlock];
  float* out = interleave ? planes : noise;
  for (int32_t i = 0; i < kTilePixels; ++i) {  // not only `count`: a fixed trip count vectorizes without a tail
    const Normals normals = noise_block(seed, pair_id, draw, first + static_cast<uint32_t>(i) * step);
    out[i] = normals.z[0];
    out[kTilePixels + i] = normals.z[1];
    out[2 * kTilePixels + i] = normals.z[2];
    out[3 * kTilePixels + i] = normals.z[3];
  }
  if (!interleave) return;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t k = 0; k < 4; ++k) noise[4 * i + k] = planes[k * kTilePixels + i];
  }
}

DPO_FAST_CLONES
void apply_noise(
    ConstArray latents, const float* noise, float signal, float sigma, int64_t stride, int64_t count,
    MutableArray noisy, float* velocity) {
  float x0[kBlock], out[kBlock];
  decode(latents, stride, count, x0);
  for (int64_t i = 0; i < count; ++i) out[i] = noised(x0[i], noise[i], signal, sigma);
  encode(out, stride, count, noisy);
  if (!velocity) return;
  for (int64_t i = 0; i < count; ++i) out[i] = velocity_of(x0[i], noise[i], signal, sigma);
  encode(out, stride, count, {velocity, kFloat32});
}

DPO_FAST_CLONES
void store_noise(const float* noise, int64_t stride, int64_t count, float* out) {
  encode(noise, stride, count, {out, kFloat32});
}

// Noises the same row of elements in both images of a pair: `count` elements, `stride` apart, from `offset` on.
void noise_row(const NoisePair& op, int64_t pair, const float* noise, int64_t offset, int64_t stride, int64_t count) {
  const int64_t image_size = op.channels * op.pixels;
  for (int64_t image : {pair, op.pairs + pair}) {
    const int64_t start = image * image_size + offset;
    apply_noise(
        at(op.latents, start), noise, op.signal[pair], op.sigma[pair], stride, count, at(op.noisy, start),
        op.velocity ? op.target + start : nullptr);
  }
  if (!op.velocity) store_noise(noise, stride, count, op.target + pair * image_size + offset);
}

}  // namespace

void noise_pair(const NoisePair& op, int threads) {
  const int64_t groups = ceil_div(op.channels, 4), tiles = ceil_div(op.pixels, kTilePixels);
  parallel_for(threads, op.pairs * tiles * groups, [&](int64_t item) {
    const int64_t group = item % groups, pixel = item / groups % tiles * kTilePixels, pair = item / groups / tiles;
    const int64_t count = std::min(kTilePixels, op.pixels - pixel), channel = 4 * group;
    const bool interleave = op.channels_last && op.channels == 4;
    float noise[kBlock];
    draw_noise(
        op.seed, static_cast<uint64_t>(op.pair_id[pair]), static_cast<uint64_t>(op.draw[pair]),
        static_cast<uint32_t>(pixel * groups + group), static_cast<uint32_t>(groups), count, interleave, noise);
    if (interleave) {
      noise_row(op, pair, noise, 4 * pixel, 1, 4 * count);
      return;
    }
    for (int64_t k = 0; k < std::min<int64_t>(4, op.channels - channel); ++k) {
      const int64_t offset =
          op.channels_last ? pixel * op.channels + channel + k : (channel + k) * op.pixels + pixel;
      noise_row(op, pair, noise + k * kTilePixels, offset, op.channels_last ? op.channels : 1, count);
    }
  });
}

}  // namespace dpo_fast::cpu
