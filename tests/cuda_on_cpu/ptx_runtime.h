// What the C++ that ptx.py writes calls. A register of PTX is an unsigned integer of its width; an instruction takes its
// operands' bits as its own type. Section numbers are those of the PTX ISA 9.0.
#pragma once

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <type_traits>

#include "machine.h"

namespace cuda_on_cpu {

using Kernel = void (*)(const void* const* parameters);
std::map<std::string, Kernel>& translated();

// ---- registers ----------------------------------------------------------------------------------------------------

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) <= sizeof(From), "an operand narrower than its instruction");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// A literal takes any integer type.
struct Literal {
  int64_t value;
};

template <typename T, typename R>
inline T operand(R bits) {
  if constexpr (std::is_same_v<R, Literal>) {
    static_assert(std::is_integral_v<T>, "an integer literal in an instruction on floats");
    return static_cast<T>(bits.value);
  } else if constexpr (std::is_integral_v<T> && std::is_integral_v<R>) {
    static_assert(sizeof(T) <= sizeof(R), "an operand narrower than its instruction");
    return static_cast<T>(bits);
  } else {
    return bits_as<T>(bits);
  }
}

// Integers that are narrower than the register are extended by their sign, if their type has one.
template <typename R, typename T>
inline void assign(R& reg, T value) {
  if constexpr (std::is_integral_v<T>) {
    static_assert(sizeof(T) <= sizeof(R) || std::is_same_v<R, bool>, "a result wider than its register");
    reg = static_cast<R>(value);
  } else {
    static_assert(sizeof(T) == sizeof(R), "a float of another width than its register");
    std::memcpy(&reg, &value, sizeof value);
  }
}

template <typename T>
using Unsigned = std::make_unsigned_t<T>;

// ---- 9.7.1 to 9.7.8: arithmetic, comparison, logic ----------------------------------------------------------------

template <typename T>
inline T plus(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(static_cast<Unsigned<T>>(static_cast<Unsigned<T>>(a) + static_cast<Unsigned<T>>(b)));
  } else {
    return a + b;
  }
}
template <typename T>
inline T minus(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(static_cast<Unsigned<T>>(static_cast<Unsigned<T>>(a) - static_cast<Unsigned<T>>(b)));
  } else {
    return a - b;
  }
}
template <typename T>
inline T times(T a, T b) {  // of integers the lower half
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
  } else {
    return a * b;
  }
}
template <typename Wide, typename T>
inline Wide times_wide(T a, T b) {
  return static_cast<Wide>(static_cast<Wide>(a) * static_cast<Wide>(b));
}
template <typename T>
inline T times_high(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>((static_cast<Wide>(a) * static_cast<Wide>(b)) >> (8 * sizeof(T)));
}
template <typename T>
inline T quotient(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    if (b == 0) return static_cast<T>(-1);  // "unspecified"
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return minus<T>(0, a);
    return a / b;
  } else {
    return a / b;
  }
}
template <typename T>
inline T remainder(T a, T b) {
  if (b == 0 || (std::is_signed_v<T> && b == static_cast<T>(-1))) return 0;
  return a % b;
}
template <typename T>
inline T smaller(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
  return a < b ? a : b;
}
template <typename T>
inline T larger(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
  return a > b ? a : b;
}
template <typename T>
inline T shifted_left(T a, uint32_t by) {
  return by >= 8 * sizeof(T) ? T(0) : static_cast<T>(static_cast<uint64_t>(a) << by);
}
template <typename T>
inline T shifted_right(T a, uint32_t by) {
  if (by >= 8 * sizeof(T)) return static_cast<T>(a < 0 ? -1 : 0);
  return static_cast<T>(a >> by);
}
inline uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t by) {  // shf.l.wrap
  by &= 31;
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) << by >> 32);
}
inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t by) {  // shf.r.wrap
  by &= 31;
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> by);
}
inline uint32_t logic3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {  // lop3
  uint32_t result = 0;
  for (unsigned i = 0; i < 8; ++i) {
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return result;
}
inline uint32_t permuted(uint32_t a, uint32_t b, uint32_t selector) {  // prmt
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned pick = selector >> 4 * i & 15;
    uint32_t byte = bytes >> 8 * (pick & 7) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
template <typename T>
inline T bit_field(T a, uint32_t position, uint32_t length) {  // bfe
  position &= 255, length &= 255;
  using U = Unsigned<T>;
  const unsigned width = 8 * sizeof(T);
  if (length == 0) return 0;
  U field = position >= width ? U(0) : static_cast<U>(static_cast<U>(a) >> position);
  if (length < width) field &= static_cast<U>((U(1) << length) - 1);
  if (std::is_signed_v<T> && length < width) {
    const unsigned last = position + length - 1 < width - 1 ? position + length - 1 : width - 1;
    if (static_cast<U>(a) >> last & 1) field |= static_cast<U>(~U(0) << length);
  }
  return static_cast<T>(field);
}
template <typename T>
inline bool unordered(T a, T b) {
  return a != a || b != b;
}

// fma.rm: rounded down. The volatile numbers keep the compiler from moving the operation out of the mode.
template <typename T>
inline __attribute__((noinline)) T fma_rounded(T a, T b, T c, int mode) {
  const int before = std::fegetround();
  volatile T x = a, y = b, z = c;
  std::fesetround(mode);
  volatile T result = std::fma(x, y, z);
  std::fesetround(before);
  return result;
}
inline float saturated(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }  // nan becomes 0
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// ---- 9.7.3: what a GPU approximates, each within the error that the ISA states ------------------------------------

// In float32 the rounding to it is part of the error, so that the drawn part is less.
inline float ex2_approx(float x) {  // relative error 2^-22 over the full range
  return static_cast<float>(approximated(std::exp2(static_cast<double>(x)), 22.5));
}
inline float lg2_approx(float x) {  // absolute error 2^-22 for x in (0.5, 2), else relative error 2^-22
  const double exact = std::log2(static_cast<double>(x));
  if (!(x > 0.5f && x < 2.0f)) return static_cast<float>(approximated(exact, 22.5));
  return static_cast<float>(exact + (approximated(1 + static_cast<double>(x), 24.5) - (1 + static_cast<double>(x))));
}
inline float rcp_approx(float x) {  // 1 ulp
  return static_cast<float>(approximated(1 / static_cast<double>(x), 24));
}
inline float sqrt_approx(float x) {  // relative error 2^-23
  return static_cast<float>(approximated(std::sqrt(static_cast<double>(x)), 24));
}
inline float rsqrt_approx(float x) {  // relative error 2^-22.9
  return static_cast<float>(approximated(1 / std::sqrt(static_cast<double>(x)), 24));
}
inline float quotient_approx(float a, float b) {  // div.approx, div.full: 2 ulp
  return static_cast<float>(approximated(static_cast<double>(a) / static_cast<double>(b), 23));
}
inline float sin_approx(float x) {  // absolute error 2^-20.5 in [-pi, pi]
  return static_cast<float>(std::sin(static_cast<double>(x)) + approximated(1, 20.6) - 1);
}
inline float cos_approx(float x) {
  return static_cast<float>(std::cos(static_cast<double>(x)) + approximated(1, 20.6) - 1);
}
inline float tanh_approx(float x) {  // relative error 2^-11
  return static_cast<float>(approximated(std::tanh(static_cast<double>(x)), 11));
}
// rcp.approx.ftz.f64 and rsqrt.approx.ftz.f64 see and give the upper 32 bits only: "a gross approximation"
inline double upper_half(double x) { return bits_as<double>(bits_as<uint64_t>(x) & 0xffffffff00000000ull); }
inline double rcp_approx(double x) { return upper_half(approximated(1 / upper_half(x), 20)); }
inline double rsqrt_approx(double x) { return upper_half(approximated(1 / std::sqrt(upper_half(x)), 20)); }

// ---- 9.7.9: conversion ---------------------------------------------------------------------------------------------

inline float from_half(uint16_t bits) { return static_cast<float>(bits_as<_Float16>(bits)); }
inline uint16_t to_half(float x) {
  if (x != x) return 0x7fff;  // the nan of a GPU
  return bits_as<uint16_t>(static_cast<_Float16>(x));
}
inline float from_bfloat16(uint16_t bits) { return bits_as<float>(static_cast<uint32_t>(bits) << 16); }
inline uint16_t to_bfloat16(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = bits_as<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// cvt.rn.f16x2 d, a, b: a in the upper half
inline uint32_t to_halves(float a, float b) { return static_cast<uint32_t>(to_half(a)) << 16 | to_half(b); }
inline uint32_t to_bfloat16s(float a, float b) {
  return static_cast<uint32_t>(to_bfloat16(a)) << 16 | to_bfloat16(b);
}
// To an integer, beyond its range the nearest; nan gives 0.
template <typename To, typename From>
inline To to_integer(From x, int mode) {
  if (x != x) return 0;
  const From whole = mode == FE_TOWARDZERO ? std::trunc(x)
                     : mode == FE_DOWNWARD ? std::floor(x)
                     : mode == FE_UPWARD   ? std::ceil(x)
                                           : std::nearbyint(x);
  const double least = static_cast<double>(std::numeric_limits<To>::min());
  const double most = static_cast<double>(std::numeric_limits<To>::max());
  if (static_cast<double>(whole) <= least) return std::numeric_limits<To>::min();
  if (static_cast<double>(whole) >= most) return std::numeric_limits<To>::max();
  return static_cast<To>(whole);
}

// ---- 9.7.9: memory -------------------------------------------------------------------------------------------------

template <typename T, int N>
struct Vector {
  T x[N];
};
// `read` and `write` are those of one space: read_global, write_shared and the like.
using Read = void (*)(uint64_t address, size_t size, void* value, Where where);
using Write = void (*)(uint64_t address, size_t size, const void* value, Where where);
template <Read read, typename T, int N>
inline Vector<T, N> loaded(uint64_t address, Where where) {
  Vector<T, N> values;
  read(address, sizeof values, &values, where);
  return values;
}
template <Write write, typename T, int N>
inline void store(uint64_t address, const Vector<T, N>& values, Where where) {
  write(address, sizeof values, &values, where);
}
template <typename T, int N>
inline Vector<T, N> load_parameter(uint64_t address) {
  Vector<T, N> values;
  std::memcpy(&values, reinterpret_cast<const void*>(address), sizeof values);
  return values;
}

// ---- 9.7.9.6: shuffles ---------------------------------------------------------------------------------------------

// c: the segment's end in the lower bits, and which bits of the lane number the segments share in the upper.
inline uint32_t shuffled(char kind, uint32_t value, uint32_t b, uint32_t c, uint32_t mask, bool& inside, Where where) {
  const Dim thread = thread_index(), size = block_size();
  const uint32_t lane = (thread.x + size.x * (thread.y + size.y * thread.z)) % kWarp;
  const uint32_t clamp = c & 31, segment = c >> 8 & 31;
  const uint32_t last = (lane & segment) | (clamp & ~segment), first = lane & segment;
  b &= 31;
  int source = 0;
  switch (kind) {
    case 'u': source = static_cast<int>(lane) - static_cast<int>(b), inside = source >= static_cast<int>(last); break;
    case 'd': source = static_cast<int>(lane + b), inside = source <= static_cast<int>(last); break;
    case 'b': source = static_cast<int>(lane ^ b), inside = source <= static_cast<int>(last); break;
    default: source = static_cast<int>(first | (b & ~segment)), inside = source <= static_cast<int>(last);
  }
  return static_cast<uint32_t>(exchange(mask, value, static_cast<uint32_t>(inside ? source : lane), !inside, where));
}

// stmatrix.m8n8.b16: lane 8 i + r has the address of row r of matrix i, and holds two numbers of row lane / 4 of each.
template <int N>
inline void store_matrices(uint32_t address, const uint32_t (&values)[N], Where where) {
  const uint32_t lane = thread_index().x % kWarp;
  for (int i = 0; i < N; ++i) {
    const uint32_t row = static_cast<uint32_t>(exchange(~0u, address, 8 * i + lane / 4, false, where));
    store<write_shared>(row + 4 * (lane % 4), Vector<uint32_t, 1>{values[i]}, where);
  }
}

}  // namespace cuda_on_cpu
