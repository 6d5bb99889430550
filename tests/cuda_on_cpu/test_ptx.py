"""The translation of PTX: instructions against NumPy and the ISA's words, what it refuses, and what it finds."""

import shutil

import numpy as np
import pytest

from tests.cuda_on_cpu.build import compiler

if shutil.which(compiler()) is None or shutil.which("c++filt") is None:
    pytest.skip("there is no C++ compiler", allow_module_level=True)

from tests.cuda_on_cpu import ptx
from tests.cuda_on_cpu.run_ptx import launch

KERNEL = """
.version 8.4
.target sm_90
.address_size 64
.visible .entry probe(.param .u64 .ptr .global in, .param .u64 out, .param .u32 rows)
{{
  .reg .pred %p<4>; .reg .b16 %rs<8>; .reg .b32 %r<16>; .reg .f32 %f<8>; .reg .b64 %rd<16>; .reg .f64 %fd<4>;
  {declarations}
  ld.param.u64 %rd1, [in]; ld.param.u64 %rd2, [out];
  mov.u32 %r1, %tid.x; mov.u32 %r2, %ntid.x;
  mul.wide.u32 %rd3, %r1, 4; add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
  mul.wide.u32 %rd6, %r2, 4; add.s64 %rd7, %rd4, %rd6; add.s64 %rd8, %rd7, %rd6;
  ld.global.b32 %r3, [%rd4]; ld.global.b32 %r4, [%rd7]; ld.global.b32 %r5, [%rd8];
  mov.b32 %f1, %r3; mov.b32 %f2, %r4; mov.b32 %f3, %r5;
{body}
  ret;
}}
"""
STORE = "st.global.b32 [%rd5], %r6; add.s64 %rd5, %rd5, %rd6;"


def run(bodies: list[str], words: np.ndarray, declarations: str = "", schedule: int = 1, shared: int = 0) -> np.ndarray:
    """What each body leaves in %r6 for the columns of words, uint32 [3, threads], which are in %r3 to %r5."""
    words = np.ascontiguousarray(words, dtype=np.uint32)
    out = np.zeros((len(bodies), words.shape[1]), dtype=np.uint32)
    text = KERNEL.format(declarations=declarations, body="\n".join(f"  {body}\n  {STORE}" for body in bodies))
    parameters = [np.uint64(words.ctypes.data).tobytes(), np.uint64(out.ctypes.data).tobytes(), bytes(4)]
    launch(text, "probe", (1, 1, 1), words.shape[1], shared, parameters, schedule)
    return out


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32).view(np.uint32)


def signed(x: np.ndarray) -> np.ndarray:
    return x.view(np.int32).astype(np.int64)


def half_pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a and b in float16, a in the upper half."""
    upper, lower = (x.view(np.float32).astype(np.float16).view(np.uint16).astype(np.uint32) for x in (a, b))
    return upper << 16 | lower


def bfloat16(x: np.ndarray) -> np.ndarray:
    return ((x.astype(np.uint64) + 0x7FFF + (x >> 16 & 1)) >> 16).astype(np.uint32)


def word(x: np.ndarray) -> np.ndarray:
    return (x & 0xFFFFFFFF).astype(np.uint32)


def bits(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).view(np.uint32)


INTEGERS = {  # of any words: the instruction, and what it gives for uint32 a, b, c
    "add.s32 %r6, %r3, %r4;": lambda a, b, c: a + b,
    "sub.s32 %r6, %r3, %r4;": lambda a, b, c: a - b,
    "mul.lo.s32 %r6, %r3, %r4;": lambda a, b, c: a * b,
    "mul.hi.u32 %r6, %r3, %r4;": lambda a, b, c: (a.astype(np.uint64) * b) >> np.uint64(32),
    "mul.hi.s32 %r6, %r3, %r4;": lambda a, b, c: (signed(a) * signed(b)) >> 32,
    "mul.wide.s32 %rd9, %r3, %r4; shr.u64 %rd9, %rd9, 7; cvt.u32.u64 %r6, %rd9;": lambda a, b, c: (
        (signed(a) * signed(b)) >> 7
    ),
    "mad.lo.s32 %r6, %r3, %r4, %r5;": lambda a, b, c: a * b + c,
    "mad.wide.u32 %rd9, %r3, %r4, 5; shr.u64 %rd9, %rd9, 32; cvt.u32.u64 %r6, %rd9;": lambda a, b, c: (
        (a.astype(np.uint64) * b + np.uint64(5)) >> np.uint64(32)
    ),
    "min.s32 %r6, %r3, %r4;": lambda a, b, c: np.minimum(signed(a), signed(b)),
    "max.u32 %r6, %r3, %r4;": lambda a, b, c: np.maximum(a, b),
    "or.b32 %r7, %r4, 1; div.s32 %r6, %r3, %r7;": lambda a, b, c: np.trunc(
        signed(a) / signed(b | np.uint32(1))
    ).astype(np.int64),
    "or.b32 %r7, %r4, 1; rem.u32 %r6, %r3, %r7;": lambda a, b, c: a % (b | np.uint32(1)),
    "and.b32 %r7, %r4, 63; shl.b32 %r6, %r3, %r7;": lambda a, b, c: np.where(
        b & 63 > 31, 0, a.astype(np.uint64) << (b & 63)
    ),
    "and.b32 %r7, %r4, 63; shr.s32 %r6, %r3, %r7;": lambda a, b, c: signed(a) >> np.minimum(b & 63, 31),
    "shf.l.wrap.b32 %r6, %r3, %r4, %r5;": lambda a, b, c: (
        (b.astype(np.uint64) << np.uint64(32) | a) << (c & 31).astype(np.uint64) >> np.uint64(32)
    ),
    "shf.r.wrap.b32 %r6, %r3, %r4, %r5;": lambda a, b, c: (
        (b.astype(np.uint64) << np.uint64(32) | a) >> (c & 31).astype(np.uint64)
    ),
    "lop3.b32 %r6, %r3, %r4, %r5, 0xE8;": lambda a, b, c: a & b | a & c | b & c,
    "lop3.b32 %r6, %r3, %r4, %r5, 0x96;": lambda a, b, c: a ^ b ^ c,
    "prmt.b32 %r6, %r3, %r4, 0x5410;": lambda a, b, c: a & 0xFFFF | b << 16,
    "prmt.b32 %r6, %r3, %r4, 0x8BC7;": lambda a, b, c: (
        (np.where(a & 0x80, 0xFF, 0) << 24 | np.where(a >> 31, 0xFF, 0) << 16)
        | (np.where(b & 0x80, 0xFF, 0) << 8 | b >> 24)
    ),
    "bfe.u32 %r6, %r3, 5, 9;": lambda a, b, c: a >> 5 & 511,
    "bfe.s32 %r6, %r3, 5, 9;": lambda a, b, c: (signed(a) << 50) >> 55,
    "not.b32 %r6, %r3;": lambda a, b, c: ~a,
    "setp.lt.s32 %p1, %r3, %r4; selp.b32 %r6, %r3, %r5, %p1;": lambda a, b, c: np.where(signed(a) < signed(b), a, c),
    "setp.hi.u32 %p1, %r3, %r4; @%p1 mov.b32 %r6, 1; @!%p1 mov.b32 %r6, 2;": lambda a, b, c: np.where(a > b, 1, 2),
    "cvt.u16.u32 %rs1, %r3; cvt.u32.u16 %r6, %rs1;": lambda a, b, c: a & 0xFFFF,
    "cvt.s64.s32 %rd9, %r3; shr.s64 %rd9, %rd9, 33; cvt.u32.u64 %r6, %rd9;": lambda a, b, c: signed(a) >> 33,
    "cvt.rn.f32.s32 %f4, %r3; mov.b32 %r6, %f4;": lambda a, b, c: bits(signed(a)),
    "cvt.rn.f32.u32 %f4, %r3; mov.b32 %r6, %f4;": lambda a, b, c: bits(a),
    "{ .reg .b16 tmp; mov.b32 {tmp, %rs2}, %r3; mov.b32 %r6, {%rs2, tmp}; }": lambda a, b, c: a >> 16 | a << 16,
}  # fmt: skip
FLOATS = {  # of finite floats: the instruction, and the word it gives for float64 x, y, z, which hold float32
    "add.rn.f32 %f4, %f1, %f2; mov.b32 %r6, %f4;": lambda x, y, z: bits(x + y),
    "mul.rn.f32 %f4, %f1, %f2; mov.b32 %r6, %f4;": lambda x, y, z: bits(x * y),
    "div.rn.f32 %f4, %f1, %f2; mov.b32 %r6, %f4;": lambda x, y, z: bits(x / y),
    "sqrt.rn.f32 %f4, %f3; mov.b32 %r6, %f4;": lambda x, y, z: bits(np.sqrt(z)),
    "neg.f32 %f4, %f1; abs.f32 %f4, %f4; mov.b32 %r6, %f4;": lambda x, y, z: bits(abs(x)),
    "cvt.f64.f32 %fd1, %f1; cvt.f64.f32 %fd2, %f2; fma.rn.f64 %fd1, %fd1, %fd2, %fd2; cvt.rn.f32.f64 %f4, %fd1;"
    " mov.b32 %r6, %f4;": lambda x, y, z: bits(x * y + y),
    "cvt.rzi.s32.f32 %r6, %f1;": lambda x, y, z: word(np.clip(np.trunc(x), -(2**31), 2**31 - 1).astype(np.int64)),
    "cvt.rmi.u32.f32 %r6, %f1;": lambda x, y, z: word(np.clip(np.floor(x), 0, 2**32 - 1).astype(np.int64)),
    "cvt.sat.f32.f32 %f4, %f1; mov.b32 %r6, %f4;": lambda x, y, z: bits(np.clip(x, 0, 1)),
    "cvt.rn.f16x2.f32 %r6, %f1, %f2;": lambda x, y, z: half_pair(bits(x), bits(y)),
    "cvt.rn.bf16x2.f32 %r6, %f1, %f2;": lambda x, y, z: bfloat16(bits(x)) << 16 | bfloat16(bits(y)),
    "cvt.rn.f16.f32 %rs1, %f1; cvt.f32.f16 %f4, %rs1; mov.b32 %r6, %f4;": lambda x, y, z: bits(
        x.astype(np.float32).astype(np.float16)
    ),
    "setp.gtu.f32 %p1, %f1, %f2; selp.b32 %r6, 3, 4, %p1;": lambda x, y, z: np.where(x > y, 3, 4),
}


def test_integer_instructions_are_those_of_the_isa(seed):
    words = np.random.default_rng(seed).integers(1 << 32, size=(3, 256), dtype=np.uint32)
    words[:, :6] = [[0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x80000001]] * 3
    for (text, expected), actual in zip(INTEGERS.items(), run(list(INTEGERS), words), strict=True):
        with np.errstate(over="ignore"):
            wanted = word(np.asarray(expected(*words)).astype(np.int64))
        assert np.array_equal(actual, wanted), text


def test_float_instructions_round_as_the_isa_says(seed):
    generator = np.random.default_rng(seed)
    x, y, z = np.ldexp(generator.standard_normal((3, 256)), generator.integers(-20, 12, (3, 256))).astype(np.float32)
    x[:4], z = [2.0**31, -(2.0**31), 3e9, 65520.0], abs(z)
    given = [v.astype(np.float64) for v in (x, y, z)]
    with np.errstate(over="ignore"):
        rows = {text: expected(*given) for text, expected in FLOATS.items()}
    for (text, wanted), actual in zip(rows.items(), run(list(FLOATS), np.stack([bits(v) for v in given])), strict=True):
        assert np.array_equal(actual, wanted), text


def test_nan_compares_and_converts_as_the_isa_says():
    words = np.stack([floats(np.nan, 1.0, np.nan), floats(1.0, np.nan, np.nan), floats(0.0, 0.0, 0.0)])
    ordered, unordered, number, neither = run(
        [
            "setp.ne.f32 %p1, %f1, %f2; selp.b32 %r6, 1, 0, %p1;",
            "setp.equ.f32 %p1, %f1, %f2; selp.b32 %r6, 1, 0, %p1;",
            "min.f32 %f4, %f1, %f2; mov.b32 %r6, %f4;",
            "setp.num.f32 %p1, %f1, %f2; selp.b32 %r6, 1, 0, %p1;",
        ],
        words,
    )
    assert ordered.tolist() == [0, 0, 0] and unordered.tolist() == [1, 1, 1] and neither.tolist() == [0, 0, 0]
    assert number[:2].view(np.float32).tolist() == [1.0, 1.0]  # the operand that is a number


APPROXIMATE = {  # instruction: what it approximates, and the relative error that the ISA states
    "ex2.approx.f32": (np.exp2, 2**-22),
    "rcp.approx.ftz.f32": (lambda x: 1 / x, 2**-23),
    "sqrt.approx.f32": (np.sqrt, 2**-23),
    "rsqrt.approx.f32": (lambda x: 1 / np.sqrt(x), 2**-22.9),
    "lg2.approx.f32": (np.log2, 2**-22),
    "tanh.approx.f32": (np.tanh, 2**-11),
}


def test_what_a_gpu_approximates_is_off_within_what_the_isa_states(seed):
    """By an error that another schedule draws anew: nothing may rest on such an instruction being exact."""
    x = np.random.default_rng(seed).uniform(2.0, 9.0, 256).astype(np.float32)
    words = np.stack([bits(x), bits(x[::-1].copy()), bits(x)])
    bodies = [f"{name} %f4, %f1; mov.b32 %r6, %f4;" for name in APPROXIMATE]
    bodies.append("div.full.f32 %f4, %f1, %f2; mov.b32 %r6, %f4;")
    rows = {**APPROXIMATE, "div.full.f32": (lambda x: x / x[::-1], 2 * 2**-23)}
    results = [run(bodies, words, schedule=schedule).view(np.float32) for schedule in (3, 4, 3)]
    for i, (name, (function, bound)) in enumerate(rows.items()):
        exact = function(x.astype(np.float64))
        for result in results:
            error = abs(result[i] / exact - 1)
            assert bound / 8 < error.max() <= bound, name
        assert (results[0][i] != results[1][i]).any() and (results[0][i] == results[2][i]).all(), name


@pytest.mark.parametrize(
    "body, message",
    [
        ("popc.b32 %r6, %r3;", "instruction popc.b32"),
        ("add.sat.s32 %r6, %r3, %r4;", "modifier sat"),
        ("ld.local.b32 %r6, [%rd1];", "an access local"),
        ("bar.sync 1, 64;", "a barrier other than barrier 0"),
        ("cvt.rn.s8.f32 %rs1, %f1;", "conversion rn from f32 to s8"),
        ("mov.u32 %r6, %clock;", "operand '%clock'"),
        ("ld.param.u64 %rd9, [rows];", "bytes 0 to 8 of a parameter of 4"),
    ],
)
def test_what_is_not_known_is_refused_with_its_line(body, message):
    text = KERNEL.format(declarations="", body=f"  {body}")
    line = text[: text.index(body)].count("\n") + 1
    with pytest.raises(ptx.Unknown, match=rf"PTX line {line}: .*{message}"):
        ptx.to_cpp(text)


SHARED = ".shared .align 4 .b8 room[256];"
ADDRESS = "mov.u32 %r7, room; shl.b32 %r8, %r1, 2; add.s32 %r7, %r7, %r8; xor.b32 %r9, %r7, 4;"
FROM_NEIGHBOUR = "st.shared.b32 [%r7], %r3; {order} ld.shared.b32 %r6, [%r9];"


@pytest.mark.parametrize("order", ["bar.sync 0;", "bar.warp.sync -1;"])
def test_shared_memory_of_another_thread_is_read_after_a_barrier(order):
    words = np.arange(3 * 64, dtype=np.uint32).reshape(3, 64)
    # all threads may write one value to one place, as in Triton's reductions
    run(["mov.u32 %r7, room; st.shared.b32 [%r7], 7; mov.b32 %r6, 0;"], words, SHARED)
    for schedule in range(6):
        out = run([f"{ADDRESS} {FROM_NEIGHBOUR.format(order=order)}"], words, SHARED, schedule)
        assert np.array_equal(out[0], words[0] ^ 1)


@pytest.mark.parametrize(
    "body, message",
    [
        (FROM_NEIGHBOUR.format(order=""), "is read before anything is written|no barrier is between"),
        # the neighbour in the other warp
        (FROM_NEIGHBOUR.format(order="bar.warp.sync -1; xor.b32 %r9, %r7, 128;"), "before anything|no barrier"),
        (FROM_NEIGHBOUR.format(order="bar.sync 0; st.shared.b32 [%r7], %r4;"), "no barrier is between"),
        ("ld.shared.b32 %r6, [%r7+256];", r"ends at byte \d+ of 256"),
        ("st.shared.b32 [%r7+2], %r3; mov.b32 %r6, 0;", "4 bytes at an address that is not a multiple"),
        ("setp.lt.u32 %p1, %r1, 9; @%p1 bar.sync 0; mov.b32 %r6, 0;", "wait at a barrier and others have ended"),
        ("st.global.b32 [%rd2], %r1; mov.b32 %r6, 0;", "two threads write"),
        ("shfl.sync.bfly.b32 %r6, %r3, 1, 31, 1;", "not in the mask|outside its mask"),
    ],
)
def test_faults_are_found_under_every_schedule(body, message):
    words = np.zeros((3, 64), dtype=np.uint32)
    for schedule in range(4):
        with pytest.raises(RuntimeError, match=message):
            run([f"{ADDRESS} {body}"], words, SHARED, schedule)


def test_shuffles_and_matrices_go_where_the_isa_says():
    lanes = np.arange(64, dtype=np.uint32)
    words = np.stack([lanes * 7, lanes, lanes])
    down, up, xor, index, segment = run(
        [
            "shfl.sync.down.b32 %r6, %r3, 3, 31, -1;",
            "shfl.sync.up.b32 %r6, %r3, 3, 0, -1;",
            "shfl.sync.bfly.b32 %r6|%p1, %r3, 5, 31, -1;",
            "shfl.sync.idx.b32 %r6, %r3, 9, 31, -1;",
            "shfl.sync.idx.b32 %r6, %r3, 2, 0x181f, -1;",  # segments of eight lanes
        ],
        words,
    )
    lane, first = lanes % 32, lanes // 32 * 32
    assert np.array_equal(down, 7 * np.where(lane + 3 < 32, lanes + 3, lanes))
    assert np.array_equal(up, 7 * np.where(lane >= 3, lanes - 3, lanes))
    assert np.array_equal(xor, 7 * (first + (lane ^ 5)))
    assert np.array_equal(index, 7 * (first + 9))
    assert np.array_equal(segment, 7 * (first + lane // 8 * 8 + 2))

    # four matrices of eight rows of eight numbers: a warp's 256 bytes behind one another, read as they lie
    body = (
        "mov.u32 %r7, tile; shl.b32 %r8, %r1, 4; add.s32 %r7, %r7, %r8;"
        "add.s32 %r9, %r3, 1000; add.s32 %r10, %r3, 2000; add.s32 %r11, %r3, 3000;"
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r7], {%r3, %r9, %r10, %r11}; bar.sync 0;"
        "shl.b32 %r8, %r1, 2; mov.u32 %r7, tile; add.s32 %r7, %r7, %r8; ld.shared.b32 %r6, [%r7+128];"
    )
    second = run([body], words[:, :32], ".shared .align 16 .b8 tile[512];")[0]
    assert np.array_equal(
        second, 1000 + 7 * lanes[:32]
    )  # the second matrix: lane 4 r + c holds its numbers 2 c of row r
