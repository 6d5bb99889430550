// CUDA's names in C++, for the .cu files compiled by g++ with -D__CUDACC__ -D__CUDA_ARCH__ (build.py). A name that is
// missing here does not compile: add it with what CUDA's documentation says of it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("cuda_shared")))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define threadIdx (cuda_on_cpu::thread_index())
#define blockIdx (cuda_on_cpu::block_index())
#define blockDim (cuda_on_cpu::block_size())
#define gridDim (cuda_on_cpu::grid_size())

#define CUDA_ON_CPU_HERE (cuda_on_cpu::Where{__FILE__, __LINE__, true})
#define __syncthreads() cuda_on_cpu::barrier(CUDA_ON_CPU_HERE)

namespace cuda_on_cpu {

inline unsigned lane() {
  const Dim thread = thread_index(), size = block_size();
  return (thread.x + size.x * (thread.y + size.y * thread.z)) % kWarp;
}

// The lane to read, or none where it lies outside the warp: the thread then keeps its own value.
template <typename T>
T shuffle(unsigned mask, T value, unsigned source, bool own, Where where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, source, own, where);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

using Kernel = void (*)(const void* const* parameters);  // one that ptx.py translated
std::map<std::string, Kernel>& translated();

// kernel<<<grid, threads, shared, stream>>>(arguments), which build.py rewrites to launching(kernel, "kernel", ...)(...).
// With CUDA_ON_CPU_PTX the translated kernel of that name runs. The arguments are copied, as a launch does.
template <typename... Parameters>
struct Launching {
  void (*kernel)(Parameters...);
  const char* name;
  dim3 grid, threads;
  size_t shared;
  void operator()(std::decay_t<Parameters>... arguments) const {
    const Dim blocks{grid.x, grid.y, grid.z}, size{threads.x, threads.y, threads.z};
#if defined(CUDA_ON_CPU_PTX)
    const auto found = translated().find(name);
    if (found == translated().end()) throw std::runtime_error(std::string("no PTX of a kernel ") + name);
    const void* const addresses[] = {&arguments...};
    launch(blocks, size, shared, [&] { found->second(addresses); });
#else
    launch(blocks, size, shared, [&] { kernel(arguments...); });
#endif
  }
};
template <typename... Parameters>
Launching<Parameters...> launching(
    void (*kernel)(Parameters...), const char* name, dim3 grid, dim3 threads, size_t shared = 0, void* = nullptr) {
  return {kernel, name, grid, threads, shared};
}

}  // namespace cuda_on_cpu

#define __shfl_sync(mask, value, source) \
  cuda_on_cpu::shuffle(mask, value, (source) % cuda_on_cpu::kWarp, false, CUDA_ON_CPU_HERE)
#define __shfl_xor_sync(mask, value, bits) \
  cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::lane() ^ (bits), false, CUDA_ON_CPU_HERE)
#define __shfl_down_sync(mask, value, step) \
  cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::lane() + (step), cuda_on_cpu::lane() + (step) > 31, CUDA_ON_CPU_HERE)
#define __shfl_up_sync(mask, value, step) \
  cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::lane() - (step), cuda_on_cpu::lane() < unsigned(step), CUDA_ON_CPU_HERE)

template <typename T>
inline T __ldg(const T* address) {
  return *address;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float __fsqrt_rn(float x) { return std::sqrt(x); }

// Functions of CUDA's own, within the errors of the CUDA C++ programming guide, "Mathematical functions": 1 ulp each.
#define exp(x) cuda_on_cpu::approximated(::exp(x), 52)
#define log1p(x) cuda_on_cpu::approximated(::log1p(x), 52)

// ---- the runtime: two devices -------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };
using cudaStream_t = struct CUstream_st*;
struct cudaFuncAttributes {
  int numRegs;
};

namespace cuda_on_cpu {
inline int& current_device() {
  static int device = 0;
  return device;
}
inline cudaError_t& last_error() {
  static cudaError_t error = cudaSuccess;
  return error;
}
}  // namespace cuda_on_cpu

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_on_cpu::last_error();
  cuda_on_cpu::last_error() = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid device ordinal";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_cpu::current_device();
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cuda_on_cpu::last_error() = cudaErrorInvalidDevice;
  cuda_on_cpu::current_device() = device;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  return attributes->numRegs = 1, cudaSuccess;
}
