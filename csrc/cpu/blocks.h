// What the CPU ops share: processing in blocks of a few hundred elements that stay in the L1 cache as float32, a clone
// of each block function for every generation of x86 vector instructions, and threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../arithmetic.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define DPO_FAST_X86 1
#define DPO_FAST_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define DPO_FAST_X86 0
#define DPO_FAST_CLONES
#endif

namespace dpo_fast::cpu {

constexpr int64_t kBlock = 512;  // elements decoded at a time

// float16 conversion by CPU instruction: the same bits as arithmetic.h, but faster. Both return the number converted.
#if DPO_FAST_X86
const bool kHasFloat16 = __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");

__attribute__((target("avx,f16c"))) inline int64_t decode_float16(const void* source, int64_t count, float* out) {
  const uint16_t* x = static_cast<const uint16_t*>(source);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  }
  return i;
}

__attribute__((target("avx,f16c"))) inline int64_t encode_float16(const float* x, int64_t count, void* target) {
  uint16_t* out = static_cast<uint16_t*>(target);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), halves);
  }
  return i;
}
#else
constexpr bool kHasFloat16 = false;
inline int64_t decode_float16(const void*, int64_t, float*) { return 0; }
inline int64_t encode_float16(const float*, int64_t, void*) { return 0; }
#endif

// Converts `count` elements, `stride` apart, to float32.
template <typename T, typename Convert>
DPO_FAST_INLINE void decode_as(const void* source, int64_t stride, int64_t count, float* out, Convert convert) {
  const T* x = static_cast<const T*>(source);
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = convert(x[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = convert(x[i * stride]);
  }
}

DPO_FAST_INLINE void decode(ConstArray x, int64_t stride, int64_t count, float* out) {
  if (x.dtype == kFloat32) {
    decode_as<float>(x.data, stride, count, out, [](float value) { return value; });
  } else if (x.dtype == kFloat16) {
    const int64_t done = stride == 1 && kHasFloat16 ? decode_float16(x.data, count, out) : 0;
    decode_as<uint16_t>(
        at(x, done).data, stride, count - done, out + done, [](uint16_t value) { return from_float16(value); });
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

DPO_FAST_INLINE void encode(const float* x, int64_t stride, int64_t count, MutableArray out) {
  if (out.dtype == kFloat32) {
    encode_as<float>(x, stride, count, out.data, [](float value) { return value; });
  } else if (out.dtype == kFloat16) {
    const int64_t done = stride == 1 && kHasFloat16 ? encode_float16(x, count, out.data) : 0;
    encode_as<uint16_t>(
        x + done, stride, count - done, at(out, done).data, [](float value) { return to_float16(value); });
  } else {
    encode_as<uint16_t>(x, stride, count, out.data, [](float value) { return to_bfloat16(value); });
  }
}

// Calls work(item) for each item, in any order. With one thread it avoids OpenMP, which hangs in a forked child.
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
