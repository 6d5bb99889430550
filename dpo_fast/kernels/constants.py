"""The constants of the ops' float32 arithmetic, used by the Triton kernels and, for Philox, by the reference.

C++ needs its own copy, in csrc/arithmetic.h; tests/kernels/test_constants.py checks that the two are equal.
Polynomials list their highest coefficient first and are rounded after every product and every sum.
"""

# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): multipliers and key increments
PHILOX_PRODUCTS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

UNIT = 2.0**-24  # spacing of the uniforms
LN_2 = 0.6931471805599453
SQRT_HALF_BITS = 0x3F3504F3  # sqrt(1/2) as the bits of a float32
# q in ln(1 + f) = f + f^2 q(f) for 1 + f in [sqrt(1/2), sqrt(2))
LOG_POLYNOMIAL = (
    *(-0.07866667956113815, 0.12821748852729797, -0.131016343832016, 0.1418900042772293, -0.1662759929895401),
    *(0.2000196874141693, -0.2500077188014984, 0.33333322405815125, -0.4999999701976776),
)
# s and c in sin(2 pi r) = r s(r^2) and cos(2 pi r) = c(r^2) for r in [-1/8, 1/8]
SINE_POLYNOMIAL = (-75.40184020996094, 81.59254455566406, -41.3416633605957, 6.2831854820251465)
COSINE_POLYNOMIAL = (59.42422103881836, -85.44882202148438, 64.93936920166016, -19.739208221435547, 1.0)

EXP_RANGE = (-104.0, 89.0)  # e^x is 0 below and infinity above
LOG2_E = 1.4426950216293335
# 1.5 * 2^23: adding x rounds x to an integer, and the sum's bits minus this number's bits are that integer
ROUND_TO_INTEGER, ROUND_TO_INTEGER_BITS = 12582912.0, 0x4B400000
LN_2_HIGH, LN_2_LOW = 0.693145751953125, 1.428606765330187e-06  # the leading 16 bits of ln(2), and the rest
# q in e^r = 1 + r + r^2 q(r) for |r| <= ln(2) / 2
EXP_POLYNOMIAL = (
    *(0.0001989098236663267, 0.0013933642767369747, 0.00833331048488617, 0.04166646674275398),
    *(0.1666666716337204, 0.5),
)
