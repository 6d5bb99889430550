// The arithmetic of every op, shared by CPU and GPU, so that what the tests prove on a CPU holds on a GPU too.
//
// Both compilers are told not to contract a * b + c, so additions, products, quotients and square roots round the same
// way everywhere, and only the reported loss calls a math library: noise and gradients have the same bits on every CPU
// and GPU. Code that a CPU compiler should vectorize is free of branches and table look-ups.
// dpo_fast/kernels/triton/arithmetic.py does the same operations in the same order with the same constants
// (dpo_fast/kernels/constants.py); tests check both.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "ops.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DPO_FAST_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define DPO_FAST_INLINE inline __attribute__((always_inline))
#else
#define DPO_FAST_INLINE inline
#endif

namespace dpo_fast {

DPO_FAST_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

DPO_FAST_INLINE int64_t bytes_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// The array that starts at element `offset` of x.
DPO_FAST_INLINE ConstArray at(ConstArray x, int64_t offset) {
  return {static_cast<const char*>(x.data) + offset * bytes_of(x.dtype), x.dtype};
}

DPO_FAST_INLINE MutableArray at(MutableArray x, int64_t offset) {
  return {static_cast<char*>(x.data) + offset * bytes_of(x.dtype), x.dtype};
}

DPO_FAST_INLINE uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

DPO_FAST_INLINE float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// ---- half precision: exact to float32, rounded to nearest even from float32 --------------------------------------

DPO_FAST_INLINE float from_bfloat16(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

DPO_FAST_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

DPO_FAST_INLINE float from_float16(uint16_t half) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(half));
#else
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;  // float32's layout, float16's exponent bias
  const uint32_t normal = magnitude + ((127u - 15u) << 23);
  const uint32_t infinite = magnitude | 0x7f800000u;
  // the value with exponent bits 113 and this mantissa, minus its implicit leading 1: exact, reads no subnormal
  const uint32_t subnormal = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
  const uint32_t finite = magnitude < (1u << 23) ? subnormal : normal;
  return float_of(sign | (magnitude >= (31u << 23) ? infinite : finite));
#endif
}

DPO_FAST_INLINE uint16_t to_float16(float x) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
  // rounding may carry into the exponent, even up to infinity, which is correct
  const uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // 0.5 has an ulp of 2^-24, float16's smallest subnormal, so the addition rounds to a multiple of it
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return static_cast<uint16_t>(sign | (magnitude >= (143u << 23) ? special : finite));
#endif
}

// c[0] x^n + ... + c[n], rounded after every product and sum
DPO_FAST_INLINE float polynomial(float, float value) { return value; }

template <typename... Rest>
DPO_FAST_INLINE float polynomial(float x, float value, float next, Rest... rest) {
  return polynomial(x, value * x + next, rest...);
}

// ---- the noise: Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller --------------------------------------------

struct Words {
  uint32_t w[4];
};

DPO_FAST_INLINE Words philox(Words counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.w[0], c1 = counter.w[1], c2 = counter.w[2], c3 = counter.w[3];
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// -2 ln(u) for u = (n + 1) * 2^-24, n the word's upper 24 bits; relative error below 2^-22
DPO_FAST_INLINE float minus_two_log(uint32_t word) {
  const uint32_t u = bits_of(static_cast<float>(static_cast<int32_t>((word >> 8) + 1u)) * 0x1p-24f);
  const int32_t exponent = static_cast<int32_t>(u - 0x3f3504f3u) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  const float f = float_of(u - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  // ln(1 + f) = f + f^2 q(f), q a Chebyshev fit
  const float q = polynomial(
      f, -0.07866667956113815f, 0.12821748852729797f, -0.131016343832016f, 0.1418900042772293f, -0.1662759929895401f,
      0.2000196874141693f, -0.2500077188014984f, 0.33333322405815125f, -0.4999999701976776f);
  const float log_u = static_cast<float>(exponent) * 0.6931471805599453f + (f + f * f * q);
  return -2.0f * log_u;
}

// cos and sin of 2 pi u, u as above; absolute error below 2^-23
DPO_FAST_INLINE void cos_sin(uint32_t word, float& cosine, float& sine) {
  const uint32_t n = (word >> 8) + 1u;
  const uint32_t quarter = (n + (1u << 21)) >> 22;
  const float r = static_cast<float>(static_cast<int32_t>(n - (quarter << 22))) * 0x1p-24f;  // in [-1/8, 1/8], exact
  const float z = r * r;
  const float s =
      polynomial(z, -75.40184020996094f, 81.59254455566406f, -41.3416633605957f, 6.2831854820251465f) * r;
  const float c = polynomial(
      z, 59.42422103881836f, -85.44882202148438f, 64.93936920166016f, -19.739208221435547f, 1.0f);
  const bool odd = quarter & 1u;
  const uint32_t cosine_sign = ((quarter + 1u) & 2u) << 30, sine_sign = (quarter & 2u) << 30;
  cosine = float_of(bits_of(odd ? s : c) ^ cosine_sign);
  sine = float_of(bits_of(odd ? c : s) ^ sine_sign);
}

struct Normals {
  float z[4];
};

DPO_FAST_INLINE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return std::sqrt(x);
#endif
}

DPO_FAST_INLINE Normals box_muller(Words words) {
  Normals normals;
  const float radius0 = square_root(minus_two_log(words.w[0])), radius2 = square_root(minus_two_log(words.w[2]));
  float cosine, sine;
  cos_sin(words.w[1], cosine, sine);
  normals.z[0] = radius0 * cosine;
  normals.z[1] = radius0 * sine;
  cos_sin(words.w[3], cosine, sine);
  normals.z[2] = radius2 * cosine;
  normals.z[3] = radius2 * sine;
  return normals;
}

// The four normals of one block of a pair's noise, which is stream 0; dpo_fast/draws.py defines the other streams.
DPO_FAST_INLINE Normals noise_block(uint64_t seed, uint64_t pair_id, uint64_t draw, uint32_t block) {
  const Words counter = {
      {block, static_cast<uint32_t>(pair_id), static_cast<uint32_t>(pair_id >> 32), static_cast<uint32_t>(draw)}};
  return box_muller(philox(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)));
}

DPO_FAST_INLINE float noised(float x0, float noise, float signal, float sigma) { return signal * x0 + sigma * noise; }

DPO_FAST_INLINE float velocity_of(float x0, float noise, float signal, float sigma) {
  return signal * noise - sigma * x0;
}

// ---- errors, margin, loss ----------------------------------------------------------------------------------------

// Adds the terms of one element to its image's three sums.
DPO_FAST_INLINE void add_terms(float p, float r, float t, float& policy, float& ref, float& delta) {
  const float policy_residual = p - t, ref_residual = r - t;
  policy += policy_residual * policy_residual;
  ref += ref_residual * ref_residual;
  delta += (p - r) * (policy_residual + ref_residual);  // = (p-t)^2 - (r-t)^2 without the cancellation
}

struct ImageSums {  // over an image's elements
  double policy, ref, delta;
};

struct ImageErrors {
  float policy, ref, delta;
};

// Float64 division is a subroutine on a GPU, so the host passes 1/n and 1/B.
DPO_FAST_INLINE double one_over(int64_t count) { return 1.0 / static_cast<double>(count); }

DPO_FAST_INLINE ImageErrors image_errors(const PairErrors& op, double mean, int64_t image, ImageSums sums) {
  const float policy = static_cast<float>(sums.policy * mean);
  if (op.ref.data) return {policy, static_cast<float>(sums.ref * mean), static_cast<float>(sums.delta * mean)};
  const float ref = op.ref_error ? op.ref_error[image] : 0.0f;
  return {policy, ref, policy - ref};
}

// -(beta/2) (delta_w - delta_l); subtracting in this order gives +0.0 for equal deltas
DPO_FAST_INLINE float pair_margin(float delta_w, float delta_l, double beta) {
  return static_cast<float>(beta / 2) * (delta_l - delta_w);
}

// -logsigmoid(x), within 4 float64 ulps of the exact value. Only here is a math library called, and its results differ
// between CPU and GPU. That affects only the reported loss: gradients are computed from the margin.
DPO_FAST_INLINE double softplus_of_minus(double x) { return (x < 0 ? -x : 0.0) + log1p(exp(x < 0 ? x : -x)); }

// weight * -[y logsigmoid(margin) + (1-y) logsigmoid(-margin)]. The unweighted loss is rounded to float32, so up
// to 2^29 equal losses add up exactly in float64: their mean is exactly that loss, in any order. Where two libraries
// round to different float32 values, the mean over the pairs differs by at most one ulp.
DPO_FAST_INLINE double pair_loss(const DPOLoss& op, int64_t pair, float margin) {
  double loss = softplus_of_minus(margin);
  if (op.label) loss = op.label[pair] * loss + (1.0 - op.label[pair]) * softplus_of_minus(-static_cast<double>(margin));
  loss = static_cast<float>(loss);
  return op.weight ? op.weight[pair] * loss : loss;
}

// e^x to within one float32 ulp (0.95 in a sweep), including subnormal results; infinity from 88.7229 on
DPO_FAST_INLINE float exponential(float x) {
  // beyond these bounds e^x is infinity or 0; a nan passes through, with an arbitrary integer n below
  const float inside = x > 89.0f ? 89.0f : x < -104.0f ? -104.0f : x;
  // x = n ln 2 + r: adding 1.5 * 2^23 rounds to an integer and leaves it in the lower bits
  const float shifted = inside * 1.4426950216293335f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  // ln 2 in two parts: 16 bits, whose product with n is exact, and the rest
  const float r = (inside - n * 0.693145751953125f) - n * 1.428606765330187e-06f;
  // e^r = 1 + r + r^2 q(r), q a Chebyshev fit of degree 5; relative error below 2^-30
  const float q = polynomial(
      r, 0.0001989098236663267f, 0.0013933642767369747f, 0.00833331048488617f, 0.04166646674275398f,
      0.1666666716337204f, 0.5f);
  const float exp_r = 1.0f + (r + r * r * q);
  // 2^n as two factors, since n lies in [-150, 128]: only the second product can round, underflow or overflow
  const uint32_t exponent = bits_of(shifted) - bits_of(12582912.0f);
  const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(exponent) >> 1);
  return exp_r * float_of((half + 127u) << 23) * float_of((exponent - half + 127u) << 23);
}

DPO_FAST_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// d loss / d prediction = grad_error * two_over(n) * (prediction - target)
DPO_FAST_INLINE float two_over(int64_t elements) { return static_cast<float>(2.0 / static_cast<double>(elements)); }

// The factor of d loss / d error that all pairs share: (1/B) (beta/2).
DPO_FAST_INLINE float error_scale(const DPOLossGrad& op) {
  return static_cast<float>(op.beta / 2 / static_cast<double>(op.errors.pairs));
}

// d loss / d error of an image: weight * scale * [y sigmoid(-margin) - (1-y) sigmoid(margin)]; negated if rejected
DPO_FAST_INLINE float grad_error_of(const DPOLossGrad& op, float scale, int64_t image) {
  const int64_t pair = image < op.errors.pairs ? image : image - op.errors.pairs;
  float descent = sigmoid(-op.margin[pair]);  // not 1 - sigmoid(margin), which is 0 from margin 17 on
  if (op.label) descent = op.label[pair] * descent - (1.0f - op.label[pair]) * sigmoid(op.margin[pair]);
  if (op.weight) descent *= op.weight[pair];
  const float grad = *op.grad_loss * scale * descent;
  return image == pair ? grad : -grad;
}

}  // namespace dpo_fast
