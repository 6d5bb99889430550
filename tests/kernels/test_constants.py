"""csrc/arithmetic.h has the numbers of dpo_fast/kernels/constants.py, function by function."""

import math
import re
from pathlib import Path

import numpy as np

from dpo_fast.kernels import constants as c

HEADER = Path(__file__).parents[2] / "csrc" / "arithmetic.h"
# the numbers of each function in the order in which they stand there
NUMBERS = {
    "philox": [*c.PHILOX_PRODUCTS, *c.PHILOX_KEY_STEPS],
    "minus_two_log": [c.UNIT, c.SQRT_HALF_BITS, 1.0, *c.LOG_POLYNOMIAL, c.LN_2, -2.0],
    "cos_sin": [c.UNIT, *c.SINE_POLYNOMIAL, *c.COSINE_POLYNOMIAL],
    "exponential": [
        *(c.EXP_RANGE[1], c.EXP_RANGE[1], c.EXP_RANGE[0], c.EXP_RANGE[0], c.LOG2_E, c.ROUND_TO_INTEGER),
        *(c.ROUND_TO_INTEGER, c.LN_2_HIGH, c.LN_2_LOW, *c.EXP_POLYNOMIAL, 1.0, c.ROUND_TO_INTEGER),
    ],
}


def numbers_of(function: str) -> list[float | int]:
    """The float32 literals and the 32-bit hexadecimal integers in a function's body, without its comments."""
    text = re.sub(r"//.*", "", HEADER.read_text())
    body = re.search(rf"^DPO_FAST_INLINE [\w ]+ {function}\(.*?^}}", text, re.DOTALL | re.MULTILINE).group()
    found = re.findall(r"-?\b(?:0x[\da-fA-F]{8}u|0x1p-\d+f|\d+\.[\d.]*(?:e-?\d+)?f)\b", body)
    return [int(x[:-1], 16) if x.endswith("u") else parsed(x[:-1]) for x in found]


def parsed(literal: str) -> float:
    return float.fromhex(literal) if "x" in literal else float(literal)


def test_the_header_has_the_same_constants():
    for function, expected in NUMBERS.items():
        actual = numbers_of(function)
        assert [type(x) for x in actual] == [type(x) for x in expected], function
        # as float32: that is what both compilers make of them
        assert [np.float32(x) if isinstance(x, float) else x for x in actual] == [
            np.float32(x) if isinstance(x, float) else x for x in expected
        ], function


def test_the_bits_are_those_of_the_number():
    assert np.float32(c.ROUND_TO_INTEGER).view(np.uint32) == c.ROUND_TO_INTEGER_BITS
    assert abs(np.uint32(c.SQRT_HALF_BITS).view(np.float32) - math.sqrt(0.5)) < 2.0**-24


def test_the_product_with_the_high_part_of_ln_2_is_exact():
    """For every n that occurs; and both parts together are ln 2 to 2^-43."""
    n = np.arange(-150, 129, dtype=np.float32)
    assert ((n * np.float32(c.LN_2_HIGH)).astype(np.float64) == n.astype(np.float64) * c.LN_2_HIGH).all()
    assert abs(c.LN_2_HIGH + float(np.float32(c.LN_2_LOW)) - math.log(2)) < 2.0**-43
