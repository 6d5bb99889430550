// What the CPU ops share: work in blocks of a few hundred numbers that stay in the first-level cache as float32, one
// version of each block function for every generation of x86 vector instructions, and threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../arithmetic.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define DPO_FAST_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define DPO_FAST_CLONES
#endif

namespace dpo_fast::cpu {

constexpr int64_t kBlock = 512;  // numbers that are decoded at a time

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t bytes_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

inline Numbers at(Numbers x, int64_t offset) {
  return {static_cast<const char*>(x.data) + offset * bytes_of(x.dtype), x.dtype};
}

inline MutableNumbers at(MutableNumbers x, int64_t offset) {
  return {static_cast<char*>(x.data) + offset * bytes_of(x.dtype), x.dtype};
}

// `count` numbers, `stride` apart, as float32. memcpy: an address may be aligned to no more than a number's size.
template <typename T, typename Convert>
DPO_FAST_INLINE void decode_as(const void* source, int64_t stride, int64_t count, float* out, Convert convert) {
  const T* x = static_cast<const T*>(source);
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = convert(x[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = convert(x[i * stride]);
  }
}

DPO_FAST_INLINE void decode(Numbers x, int64_t stride, int64_t count, float* out) {
  if (x.dtype == kFloat32) {
    decode_as<float>(x.data, stride, count, out, [](float value) { return value; });
  } else if (x.dtype == kFloat16) {
    decode_as<uint16_t>(x.data, stride, count, out, [](uint16_t value) { return from_float16(value); });
  } else {
    decode_as<uint16_t>(x.data, stride, count, out, [](uint16_t value) { return from_bfloat16(value); });
  }
}

template <typename T, typename Convert>
DPO_FAST_INLINE void encode_as(const float* x, int64_t stride, int64_t count, void* target, Convert convert) {
  T* out = static_cast<T*>(target);
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = convert(x[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i * stride] = convert(x[i]);
  }
}

DPO_FAST_INLINE void encode(const float* x, int64_t stride, int64_t count, MutableNumbers out) {
  if (out.dtype == kFloat32) {
    encode_as<float>(x, stride, count, out.data, [](float value) { return value; });
  } else if (out.dtype == kFloat16) {
    encode_as<uint16_t>(x, stride, count, out.data, [](float value) { return to_float16(value); });
  } else {
    encode_as<uint16_t>(x, stride, count, out.data, [](float value) { return to_bfloat16(value); });
  }
}

// work(item) for each item, in any order. One thread does not touch OpenMP, which hangs in a forked child.
template <typename Work>
void parallel_for(int threads, int64_t items, const Work& work) {
  threads = static_cast<int>(std::min<int64_t>(threads, items));
  if (threads <= 1) {
    for (int64_t item = 0; item < items; ++item) work(item);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t item = 0; item < items; ++item) work(item);
}

}  // namespace dpo_fast::cpu
