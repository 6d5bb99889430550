// float16 of CUDA by the compiler's _Float16, which converts to nearest even as a GPU does.
#pragma once

#include "cuda_runtime.h"

struct __half {
  _Float16 x;
};
inline __half __ushort_as_half(unsigned short bits) {
  __half half;
  std::memcpy(&half, &bits, sizeof bits);
  return half;
}
inline unsigned short __half_as_ushort(__half half) {
  unsigned short bits;
  std::memcpy(&bits, &half, sizeof bits);
  return (bits & 0x7fff) > 0x7c00 ? 0x7fff : bits;  // the nan of a GPU
}
inline float __half2float(__half half) { return static_cast<float>(half.x); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
