// Every op of the extension, with the shapes and dtypes behind its pointers.
//
// A call has B pairs of images of n = C * H * W elements, chosen images first. All arrays are dense; an image is a row
// of n elements, contiguous or channels_last, in the same memory order in all arrays of a call.
// dpo_fast/kernels/reference.py specifies the values, dpo_fast/kernels/native.py checks the arguments.
//
// cpu:: uses up to `threads` OpenMP threads; the results do not depend on their number. cuda:: launches on a stream of
// a device, which is made current only for the call; it allocates nothing, never synchronizes and throws
// std::runtime_error when a launch fails.
#pragma once

#include <cstdint>
#include <string>

namespace dpo_fast {

enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct ConstArray {  // its dtype is known only at run time
  const void* data;
  int dtype;
};

struct MutableArray {
  void* data;
  int dtype;
};

struct NoisePair {
  ConstArray latents;     // [2B, C, H, W]
  const float* signal;    // [B] sqrt(abar)
  const float* sigma;     // [B] sqrt(1 - abar)
  const int64_t* pair_id; // [B]
  const int64_t* draw;    // [B]
  uint64_t seed;
  MutableArray noisy;     // [2B, C, H, W]
  float* target;          // the noise, [B, C, H, W]; with velocity, signal * noise - sigma * latents, [2B, C, H, W]
  int64_t pairs;          // B
  int64_t channels;       // C
  int64_t pixels;         // H * W
  bool channels_last;
  bool velocity;
};

struct PairErrors {
  ConstArray policy;       // [2B, n] predictions
  ConstArray ref;          // [2B, n] predictions, or null
  const float* ref_error;  // [2B] errors instead of predictions, or null
  ConstArray target;       // [targets, n]
  int64_t pairs;           // B
  int64_t targets;         // B, shared by both images of a pair, or 2B
  int64_t elements;        // n
  float* sums;             // workspace, pair_sums_floats(2B, n) elements
  float* policy_error_out; // [2B]
  float* ref_error_out;    // [2B]
  float* error_delta_out;  // [2B] policy_error - ref_error; null for dpo_loss, which has no such output
};

struct PairErrorsGrad {  // grad = grad_error * (2/n) * (policy - target)
  const float* grad_error; // [2B]
  ConstArray policy;       // [2B, n]
  ConstArray target;       // [targets, n]
  int64_t pairs;
  int64_t targets;
  int64_t elements;
  MutableArray grad;       // [2B, n]
};

struct DPOLoss {
  PairErrors errors;
  double beta;
  const float* label;  // [B] or null
  const float* weight; // [B] or null
  float* loss;         // []
  float* margin;       // [B]
};

struct DPOLossGrad {
  const float* grad_loss; // []
  const float* margin;    // [B]
  const float* label;     // [B] or null
  const float* weight;    // [B] or null
  double beta;
  PairErrorsGrad errors;  // its grad_error is not used
};

namespace cpu {
int64_t pair_sums_floats(int64_t images, int64_t elements);
void noise_pair(const NoisePair& op, int threads);
void pair_errors(const PairErrors& op, int threads);
void pair_errors_grad(const PairErrorsGrad& op, int threads);
void dpo_loss(const DPOLoss& op, int threads);
void dpo_loss_grad(const DPOLossGrad& op, int threads);
}  // namespace cpu

namespace cuda {
struct Stream {
  int device;   // ordinal
  void* stream; // cudaStream_t
};
int64_t pair_sums_floats(int64_t images, int64_t elements);
void noise_pair(const NoisePair& op, Stream where);              // 1 launch
void pair_errors(const PairErrors& op, Stream where);            // 2 launches
void pair_errors_grad(const PairErrorsGrad& op, Stream where);   // 1 launch
void dpo_loss(const DPOLoss& op, Stream where);                  // 2 launches
void dpo_loss_grad(const DPOLossGrad& op, Stream where);         // 1 launch
std::string fault(int device);  // loads all kernels onto the device; returns why they cannot run, or ""
}  // namespace cuda

}  // namespace dpo_fast
