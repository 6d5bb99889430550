"""The arithmetic of the kernels: the operations of csrc/arithmetic.h, with the same constants in the same order.

Noise and gradients are therefore bit-identical to the native backend's. Float32 roots and quotients use sqrt_rn and
div_rn, which round to nearest; a GPU computes float32 tl.sqrt, `/`, tl.exp and tl.log with approximate instructions.
Kernels have to be launched with enable_fp_fusion=False, or a * b + c is rounded once instead of twice.
"""

import triton
import triton.language as tl

from dpo_fast.kernels import constants

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)

PHILOX_PRODUCT_0, PHILOX_PRODUCT_1 = map(tl.constexpr, constants.PHILOX_PRODUCTS)
PHILOX_KEY_STEP_0, PHILOX_KEY_STEP_1 = map(tl.constexpr, constants.PHILOX_KEY_STEPS)
UNIT = tl.constexpr(constants.UNIT)
LN_2, SQRT_HALF_BITS = tl.constexpr(constants.LN_2), tl.constexpr(constants.SQRT_HALF_BITS)
LOG_POLYNOMIAL = tl.constexpr(constants.LOG_POLYNOMIAL)
SINE_POLYNOMIAL = tl.constexpr(constants.SINE_POLYNOMIAL)
COSINE_POLYNOMIAL = tl.constexpr(constants.COSINE_POLYNOMIAL)
EXP_LEAST, EXP_MOST = map(tl.constexpr, constants.EXP_RANGE)
LOG2_E, ROUND_TO_INTEGER = tl.constexpr(constants.LOG2_E), tl.constexpr(constants.ROUND_TO_INTEGER)
ROUND_TO_INTEGER_BITS = tl.constexpr(constants.ROUND_TO_INTEGER_BITS)
LN_2_HIGH, LN_2_LOW = tl.constexpr(constants.LN_2_HIGH), tl.constexpr(constants.LN_2_LOW)
EXP_POLYNOMIAL = tl.constexpr(constants.EXP_POLYNOMIAL)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Round float32 x to `dtype`, to nearest, ties to even. The interpreter's own cast to bfloat16 truncates."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        upper = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        upper = tl.where(x == x, upper, 0x7FC0)  # the sum could carry a nan's bits into the sign
        return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def polynomial(x, coefficients: tl.constexpr, degree: tl.constexpr):
    """Evaluate a polynomial at x by Horner's scheme; the highest coefficient comes first."""
    value = coefficients[0]
    for i in tl.static_range(1, degree + 1):
        value = value * x + coefficients[i]
    return value


# The noise


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al., SC 2011) on uint32; products and key sums wrap."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, PHILOX_PRODUCT_0), tl.mul(c0, PHILOX_PRODUCT_0, sanitize_overflow=False)
        high1, low1 = tl.umulhi(c2, PHILOX_PRODUCT_1), tl.mul(c2, PHILOX_PRODUCT_1, sanitize_overflow=False)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, PHILOX_KEY_STEP_0, sanitize_overflow=False)
        k1 = tl.add(k1, PHILOX_KEY_STEP_1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def minus_two_log(word):
    """-2 ln(u) for u = (n + 1) * 2^-24, n the upper 24 bits of the word; relative error below 2^-22."""
    u = ((word >> 8) + 1).to(tl.int32).to(tl.float32) * UNIT
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23  # mantissa in [sqrt(1/2), sqrt(2))
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    log_u = exponent.to(tl.float32) * LN_2 + (f + f * f * polynomial(f, LOG_POLYNOMIAL, 8))
    return -2.0 * log_u


@triton.jit
def cos_sin(word):
    """cos and sin of 2 pi u, with u as in minus_two_log; absolute error below 2^-23."""
    n = ((word >> 8) + 1).to(tl.int32)
    quarter = (n + (1 << 21)) >> 22
    r = (n - (quarter << 22)).to(tl.float32) * UNIT  # in [-1/8, 1/8], exact
    z = r * r
    s = polynomial(z, SINE_POLYNOMIAL, 3) * r
    c = polynomial(z, COSINE_POLYNOMIAL, 4)
    odd = (quarter & 1) != 0
    # negates by flipping the sign bit: Triton before 3.8 computes -x as 0 - x, which loses the sign of 0
    cosine = tl.where(odd, s, c).to(tl.int32, bitcast=True) ^ (((quarter + 1) & 2) << 30)
    sine = tl.where(odd, c, s).to(tl.int32, bitcast=True) ^ ((quarter & 2) << 30)
    return cosine.to(tl.float32, bitcast=True), sine.to(tl.float32, bitcast=True)


@triton.jit
def box_muller(word0, word1):
    """Two standard normals, within 1e-6 of the exact values for u = (word >> 8) + 1 over 2^24."""
    radius = tl.sqrt_rn(minus_two_log(word0))
    cosine, sine = cos_sin(word1)
    return radius * cosine, radius * sine


# Errors and loss


@triton.jit
def one_over(count):
    """1 / count in float64, for an integer. Division in float64 is always correctly rounded."""
    return 1.0 / tl.cast(count, tl.float64)


@triton.jit
def exponential(x):
    """e^x for float32 x, within one unit in the last place, including subnormal results."""
    # beyond these bounds e^x is infinity or 0; a nan passes through, with an arbitrary integer n below
    inside = tl.where(x > EXP_MOST, EXP_MOST, tl.where(x < EXP_LEAST, EXP_LEAST, x))
    # x = n ln 2 + r
    shifted = inside * LOG2_E + ROUND_TO_INTEGER
    n = shifted - ROUND_TO_INTEGER
    r = (inside - n * LN_2_HIGH) - n * LN_2_LOW
    exp_r = 1.0 + (r + r * r * polynomial(r, EXP_POLYNOMIAL, 5))
    # 2^n by two factors, since n lies in [-150, 128]: only the second product can round, underflow or overflow
    exponent = shifted.to(tl.int32, bitcast=True) - ROUND_TO_INTEGER_BITS
    half = exponent >> 1
    return exp_r * power_of_two(half) * power_of_two(exponent - half)


@triton.jit
def power_of_two(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(x):
    return tl.div_rn(1.0, 1.0 + exponential(-x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = -logsigmoid(-x) for float64 x, within 8 units in the last place however large |x|.

    CUDA's float64 exp and log (each within 1 unit, by NVIDIA's table) differ from a CPU's. Only the reported loss
    depends on them.
    """
    small = tl.exp(-tl.abs(x))
    near_one = 1 + small
    # log1p(small): rounding near_one changes its log and near_one - 1 by nearly the same factor, which cancels
    kept = near_one - 1
    log1p = tl.where(kept > 0, tl.log(near_one) * (small / tl.where(kept > 0, kept, 1.0)), small)
    return tl.maximum(x, 0.0) + log1p
