// What the CUDA ops share: 16-byte loads and stores of eight elements of any dtype, and kernel launches.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../arithmetic.h"

namespace dpo_fast::cuda {

constexpr int kVector = 8;  // elements per thread at a time: 16 bytes in half precision, twice 16 in float32
constexpr int kThreads = 256;

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Loads kernels onto the current device. A kernel is otherwise loaded at its first launch (CUDA_MODULE_LOADING=LAZY is
// the default), which fails while a graph is captured.
template <typename... Kernels>
void preload(Kernels*... kernels) {
  cudaFuncAttributes attributes;
  (check(cudaFuncGetAttributes(&attributes, kernels)), ...);
}

// Each preloads all kernels of one .cu file.
void preload_noise_pair();
void preload_pair_errors();
void preload_dpo_loss();

// Makes a device current for the object's lifetime. native.py has already made it current in PyTorch's runtime and so
// in the driver, which this static runtime follows; so nothing changes here, and PyTorch's runtime keeps its device.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&previous_));
    if (device != previous_) check(cudaSetDevice(device));
    changed_ = device != previous_;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(previous_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Rows of a grid, up to CUDA's limit; kernels stride over the rest.
inline unsigned grid_rows(int64_t rows) { return static_cast<unsigned>(rows < 65535 ? rows : 65535); }

__device__ __forceinline__ bool is_aligned(const void* address) {
  return (reinterpret_cast<uintptr_t>(address) & 15) == 0;
}

// Eight elements as stored in memory, to be decoded once a thread has issued all its loads.
struct Raw {
  uint32_t word[kVector];  // float32: one element each; half precision: two each in the first four words
};

// Loads x[start .. start + 8), with zeros from x[end] on. aligned: x.data is a multiple of 16 bytes, start one of 8.
__device__ __forceinline__ Raw load(ConstArray x, int64_t start, int64_t end, bool aligned) {
  Raw raw = {};
  if (aligned && start + kVector <= end) {
    const uint4* source = static_cast<const uint4*>(at(x, start).data);
    const uint4 low = __ldg(source);
    raw.word[0] = low.x, raw.word[1] = low.y, raw.word[2] = low.z, raw.word[3] = low.w;
    if (x.dtype == kFloat32) {
      const uint4 high = __ldg(source + 1);
      raw.word[4] = high.x, raw.word[5] = high.y, raw.word[6] = high.z, raw.word[7] = high.w;
    }
  } else if (x.dtype == kFloat32) {
    const uint32_t* source = static_cast<const uint32_t*>(x.data) + start;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (start + i < end) raw.word[i] = __ldg(source + i);
    }
  } else {
    const uint16_t* source = static_cast<const uint16_t*>(x.data) + start;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (start + i < end) raw.word[i / 2] |= static_cast<uint32_t>(__ldg(source + i)) << (i % 2 * 16);
    }
  }
  return raw;
}

struct Vector {
  float x[kVector];
};

__device__ __forceinline__ Vector decode(const Raw& raw, int dtype) {
  Vector out;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const uint16_t half = static_cast<uint16_t>(raw.word[i / 2] >> (i % 2 * 16));
    out.x[i] = dtype == kFloat32 ? float_of(raw.word[i]) : dtype == kFloat16 ? from_float16(half) : from_bfloat16(half);
  }
  return out;
}

// x[start .. start + 8) = values, up to x[end - 1]
__device__ __forceinline__ void store(MutableArray x, int64_t start, int64_t end, bool aligned, const Vector& values) {
  if (x.dtype == kFloat32) {
    float* target = static_cast<float*>(x.data) + start;
    if (aligned && start + kVector <= end) {
      const float* v = values.x;
      reinterpret_cast<float4*>(target)[0] = make_float4(v[0], v[1], v[2], v[3]);
      reinterpret_cast<float4*>(target)[1] = make_float4(v[4], v[5], v[6], v[7]);
      return;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (start + i < end) target[i] = values.x[i];
    }
    return;
  }
  uint16_t half[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    half[i] = x.dtype == kFloat16 ? to_float16(values.x[i]) : to_bfloat16(values.x[i]);
  }
  uint16_t* target = static_cast<uint16_t*>(x.data) + start;
  if (aligned && start + kVector <= end) {
    *reinterpret_cast<uint4*>(target) = make_uint4(
        half[0] | half[1] << 16, half[2] | half[3] << 16, half[4] | half[5] << 16, half[6] | half[7] << 16);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (start + i < end) target[i] = half[i];
  }
}

}  // namespace dpo_fast::cuda
