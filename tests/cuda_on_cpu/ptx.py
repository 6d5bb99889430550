"""PTX to C++: each kernel becomes a function that one thread of the machine runs (machine.h, ptx_runtime.h).

A register becomes a variable, a label a label, an instruction a statement; what an instruction does is written below
or in ptx_runtime.h, from the PTX ISA. An instruction or a modifier that is not known is an error: nothing is guessed.
"""

import re
import subprocess
from dataclasses import dataclass, field

TYPES = {"f32": "float", "f64": "double", "pred": "bool"}
for bits in (8, 16, 32, 64):
    TYPES |= {f"{kind}{bits}": f"{'' if kind == 's' else 'u'}int{bits}_t" for kind in "bus"}
SMALL_FLOATS = {"f16": "half", "bf16": "bfloat16"}  # converted, not computed with
WIDER = {"uint16_t": "uint32_t", "int16_t": "int32_t", "uint32_t": "uint64_t", "int32_t": "int64_t"}
MODES = {"rn": "FE_TONEAREST", "rz": "FE_TOWARDZERO", "rm": "FE_DOWNWARD", "rp": "FE_UPWARD"}
INTEGER_MODES = {f"{mode}i": value for mode, value in MODES.items()}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<="}
COMPARISONS |= {"hi": ">", "hs": ">="}
# instructions that differ only in the C++ of what they compute
BINARY = {"add": "plus", "sub": "minus", "min": "smaller", "max": "larger", "rem": "remainder"}
LOGIC = {"and": "&", "or": "|", "xor": "^"}
APPROXIMATE = ("ex2", "lg2", "sin", "cos", "tanh")  # NAME_approx of ptx_runtime.h
COORDINATES = {"tid": "thread_index", "ctaid": "block_index", "ntid": "block_size", "nctaid": "grid_size"}


class Unknown(NotImplementedError):
    """PTX that the translator does not know; the message has the line."""


@dataclass
class Module:
    """What a text of PTX declares."""

    kernels: dict[str, str] = field(default_factory=dict)  # name without namespaces and types: the function's C++
    shared: dict[str, int] = field(default_factory=dict)  # variable: offset
    shared_bytes: int = 0  # of all static variables; what is extern begins behind them
    opcodes: dict[str, int] = field(default_factory=dict)


@dataclass
class Kernel:
    """The function that is being translated."""

    module: Module
    parameters: dict[str, tuple[int, int]]  # name: number, bytes
    line: int = 0
    registers: set[str] = field(default_factory=set)

    # ---- operands

    def value(self, text: str, type: str | None = None) -> str:
        """An operand as C++ of the type, or its bits."""
        bits = self.bits(text)
        return bits if type is None else f"operand<{type}>({bits})"

    def bits(self, text: str) -> str:
        if text.startswith("!"):
            return f"!{self.bits(text[1:])}"
        if special := re.fullmatch(r"%(n?ctaid|n?tid)\.([xyz])", text):
            return f"{COORDINATES[special[1]]}().{special[2]}"
        if text in self.registers:
            return variable_of(text)
        if exact := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", text):
            return f"uint32_t(0x{exact[1]}u)"
        if exact := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", text):
            return f"uint64_t(0x{exact[1]}ull)"
        if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", text):
            return f"Literal{{int64_t({text.rstrip('U')}ll)}}"
        if text in self.parameters:
            return f"reinterpret_cast<uint64_t>(parameters[{self.parameters[text][0]}])"
        if text in self.module.shared:
            return f"Literal{{{self.module.shared[text]}ll}}"
        raise self.unknown(f"operand {text!r}")

    def unknown(self, what: str) -> Unknown:
        return Unknown(f"PTX line {self.line}: {what} is not known to tests/cuda_on_cpu/ptx.py")

    @property
    def where(self) -> str:
        return f'{{"PTX", {self.line}, false}}'

    def set(self, register: str, value: str) -> str:
        return "" if register == "_" else f"assign({self.bits(register)}, {value});"

    # ---- instructions

    def instruction(self, opcode: str, operands: list[str]) -> str:
        name, *modifiers = opcode.split(".")
        types = [m for m in modifiers if m in TYPES or m in SMALL_FLOATS or m in ("f16x2", "bf16x2")]
        rest = [m for m in modifiers if m not in types]
        if name in BINARY:
            return self.binary(BINARY[name], rest, types, operands)
        if name in LOGIC:
            return self.logic(LOGIC[name], rest, types, operands)
        if name in APPROXIMATE:
            return self.approximate(f"{name}_approx", rest, types, operands)
        method = getattr(self, f"do_{name}", None)
        if method is None:
            raise self.unknown(f"instruction {opcode}")
        return method(rest, types, operands)

    def plain(self, rest: list[str], types: list[str], allowed: tuple[str, ...] = ()) -> str:
        """The C++ type of an instruction of one type whose modifiers, but for those allowed, change nothing here."""
        if strange := set(rest) - set(allowed):
            raise self.unknown(f"modifier {', '.join(sorted(strange))}")
        if len(types) != 1 or types[0] not in TYPES:
            raise self.unknown(f"type {'.'.join(types)}")
        return TYPES[types[0]]

    def binary(self, function: str, rest: list[str], types: list[str], operands: list[str]) -> str:
        """d = function(a, b); additions, products and the like of floats round to nearest, .ftz flushes."""
        type = self.plain(rest, types, ("rn", "ftz", "lo"))
        call = f"{function}<{type}>({self.value(operands[1], type)}, {self.value(operands[2], type)})"
        if "ftz" in rest:
            a, b = (f"flushed({self.value(x, type)})" for x in operands[1:3])
            call = f"flushed({function}<{type}>({a}, {b}))"
        return self.set(operands[0], call)

    def do_div(self, rest, types, operands) -> str:
        if types == ["f32"] and ("full" in rest or "approx" in rest):
            a, b = (self.value(x, "float") for x in operands[1:3])
            return self.set(operands[0], f"quotient_approx({a}, {b})")
        return self.binary("quotient", rest, types, operands)

    def do_mul(self, rest, types, operands) -> str:
        if "wide" in rest or "hi" in rest:
            type = self.plain(rest, types, ("wide", "hi"))
            function = f"times_wide<{WIDER[type]}, {type}>" if "wide" in rest else f"times_high<{type}>"
            return self.set(
                operands[0], f"{function}({self.value(operands[1], type)}, {self.value(operands[2], type)})"
            )
        return self.binary("times", rest, types, operands)

    def do_mad(self, rest, types, operands) -> str:
        type = self.plain(rest, types, ("lo", "wide"))
        a, b = self.value(operands[1], type), self.value(operands[2], type)
        if "wide" in rest:
            wide = WIDER[type]
            product = f"times_wide<{wide}, {type}>({a}, {b})"
            return self.set(operands[0], f"plus<{wide}>({product}, {self.value(operands[3], wide)})")
        if type in ("float", "double"):
            raise self.unknown("mad on floats")
        return self.set(operands[0], f"plus<{type}>(times<{type}>({a}, {b}), {self.value(operands[3], type)})")

    def do_fma(self, rest, types, operands) -> str:
        type = self.plain(rest, types, (*MODES, "ftz"))
        a, b, c = (self.value(x, type) for x in operands[1:4])
        mode = next(MODES[m] for m in rest if m in MODES)
        if "ftz" in rest and mode != MODES["rn"]:
            raise self.unknown("this fma")
        if "ftz" in rest:
            return self.set(operands[0], f"flushed(std::fma(flushed({a}), flushed({b}), flushed({c})))")
        call = f"std::fma({a}, {b}, {c})" if mode == MODES["rn"] else f"fma_rounded<{type}>({a}, {b}, {c}, {mode})"
        return self.set(operands[0], call)

    def do_neg(self, rest, types, operands) -> str:
        type = self.plain(rest, types, ("ftz",))
        a = self.value(operands[1], type)
        return self.set(operands[0], f"-{a}" if type in ("float", "double") else f"minus<{type}>(0, {a})")

    def do_abs(self, rest, types, operands) -> str:
        type = self.plain(rest, types, ("ftz",))
        return self.set(operands[0], f"static_cast<{type}>(std::abs({self.value(operands[1], type)}))")

    def do_not(self, rest, types, operands) -> str:
        type = self.plain(rest, types)
        sign = "!" if type == "bool" else "~"
        return self.set(operands[0], f"static_cast<{type}>({sign}{self.value(operands[1], type)})")

    def logic(self, sign: str, rest, types, operands) -> str:
        type = self.plain(rest, types)
        a, b = (self.value(x, type) for x in operands[1:3])
        return self.set(operands[0], f"static_cast<{type}>({a} {sign} {b})")

    def do_shl(self, rest, types, operands) -> str:
        type = self.plain(rest, types)
        return self.set(
            operands[0], f"shifted_left<{type}>({self.value(operands[1], type)}, {self.value(operands[2], 'uint32_t')})"
        )

    def do_shr(self, rest, types, operands) -> str:
        type = self.plain(rest, types)
        a, by = self.value(operands[1], type), self.value(operands[2], "uint32_t")
        return self.set(operands[0], f"shifted_right<{type}>({a}, {by})")

    def do_shf(self, rest, types, operands) -> str:
        if rest not in (["l", "wrap"], ["r", "wrap"]) or types != ["b32"]:
            raise self.unknown("this shf")
        function = "funnel_left" if rest[0] == "l" else "funnel_right"
        return self.set(operands[0], f"{function}({', '.join(self.value(x, 'uint32_t') for x in operands[1:4])})")

    def do_lop3(self, rest, types, operands) -> str:
        self.plain(rest, types)
        return self.set(operands[0], f"logic3({', '.join(self.value(x, 'uint32_t') for x in operands[1:5])})")

    def do_prmt(self, rest, types, operands) -> str:
        self.plain(rest, types)
        return self.set(operands[0], f"permuted({', '.join(self.value(x, 'uint32_t') for x in operands[1:4])})")

    def do_bfe(self, rest, types, operands) -> str:
        type = self.plain(rest, types)
        a, position, length = self.value(operands[1], type), *(self.value(x, "uint32_t") for x in operands[2:4])
        return self.set(operands[0], f"bit_field<{type}>({a}, {position}, {length})")

    def do_setp(self, rest, types, operands) -> str:
        type = TYPES[types[0]]
        comparison = rest[0]
        if len(types) != 1 or rest[1:] not in ([], ["ftz"]) or len(operands) != 3 or "|" in operands[0]:
            raise self.unknown("this setp")
        a, b = (self.value(x, type) for x in operands[1:3])
        if comparison in ("num", "nan"):
            test = f"{'!' if comparison == 'num' else ''}unordered({a}, {b})"
        elif comparison in COMPARISONS:
            test = f"({a} {COMPARISONS[comparison]} {b})"
            if comparison == "ne" and type in ("float", "double"):
                test = f"({test} && !unordered({a}, {b}))"  # != of C++ is neu
        elif comparison[-1] == "u" and comparison[:-1] in COMPARISONS:
            test = f"({a} {COMPARISONS[comparison[:-1]]} {b} || unordered({a}, {b}))"
        else:
            raise self.unknown(f"comparison {comparison}")
        return self.set(operands[0], test)

    def do_selp(self, rest, types, operands) -> str:
        type = self.plain(rest, types)
        a, b, chosen = self.value(operands[1], type), self.value(operands[2], type), self.bits(operands[3])
        return self.set(operands[0], f"({chosen} ? {a} : {b})")

    # ---- what a GPU approximates

    def do_sqrt(self, rest, types, operands) -> str:
        return self.root(rest, types, operands, "std::sqrt", "sqrt_approx")

    def do_rcp(self, rest, types, operands) -> str:
        return self.root(rest, types, operands, "1 / ", "rcp_approx")

    def do_rsqrt(self, rest, types, operands) -> str:
        return self.root(rest, types, operands, None, "rsqrt_approx")

    def root(self, rest, types, operands, exact: str | None, approximate: str) -> str:
        type = self.plain(rest, types, ("rn", "approx", "ftz"))
        a = self.value(operands[1], type)
        if "approx" in rest:
            call = f"{approximate}({'flushed' if 'ftz' in rest and type == 'float' else ''}({a}))"
            return self.set(operands[0], f"flushed({call})" if "ftz" in rest and type == "float" else call)
        if exact is None:
            raise self.unknown("this root")
        call = f"flushed({exact}(flushed({a})))" if "ftz" in rest else f"{exact}({a})"
        return self.set(operands[0], call)

    def approximate(self, function: str, rest, types, operands) -> str:
        self.plain(rest, types, ("approx", "ftz"))
        if types != ["f32"] or "approx" not in rest:
            raise self.unknown(f"{function} that is not approximate")
        a = self.value(operands[1], "float")
        return self.set(operands[0], f"flushed({function}(flushed({a})))" if "ftz" in rest else f"{function}({a})")

    # ---- moving and converting

    def do_mov(self, rest, types, operands) -> str:
        type = self.plain(rest, types)
        to, source = operands
        if to.startswith("{"):
            parts = split(to[1:-1])
            width = int(re.search(r"\d+", types[0])[0]) // len(parts)
            pieces = (f"static_cast<uint{width}_t>(all >> {i * width})" for i in range(len(parts)))
            moves = "".join(self.set(part, piece) for part, piece in zip(parts, pieces, strict=True))
            return f"{{ const {type} all = {self.value(source, type)}; {moves} }}"
        if source.startswith("{"):
            parts = split(source[1:-1])
            width = int(re.search(r"\d+", types[0])[0]) // len(parts)
            pieces = (f"{type}({self.value(part, f'uint{width}_t')}) << {i * width}" for i, part in enumerate(parts))
            return self.set(to, f"static_cast<{type}>({' | '.join(pieces)})")
        return self.set(to, self.value(source, type))

    def do_cvta(self, rest, types, operands) -> str:
        type = self.plain(rest, types, ("to", "global", "shared", "param"))
        if "shared" in rest:
            raise self.unknown("a generic address of shared memory")
        return self.set(operands[0], self.value(operands[1], type))

    def do_cvt(self, rest, types, operands) -> str:
        to, source = types
        if source in SMALL_FLOATS and to == "f32":
            call = f"from_{SMALL_FLOATS[source]}({self.value(operands[1], 'uint16_t')})"
            return self.set(operands[0], call)
        if to in SMALL_FLOATS and source == "f32" and rest == ["rn"]:
            return self.set(operands[0], f"to_{SMALL_FLOATS[to]}({self.value(operands[1], 'float')})")
        if to in ("f16x2", "bf16x2") and source == "f32" and rest == ["rn"]:
            function = {"f16x2": "to_halves", "bf16x2": "to_bfloat16s"}[to]
            return self.set(operands[0], f"{function}({', '.join(self.value(x, 'float') for x in operands[1:3])})")
        if to not in TYPES or source not in TYPES:
            raise self.unknown(f"conversion from {source} to {to}")
        a, type = self.value(operands[1], TYPES[source]), TYPES[to]
        if "sat" in rest and to == source == "f32":
            return self.set(operands[0], f"saturated({a})")
        to_float, from_float = to[0] == "f", source[0] == "f"
        if from_float and not to_float:
            mode = next((INTEGER_MODES[m] for m in rest if m in INTEGER_MODES), None)
            if mode is None or set(rest) - set(INTEGER_MODES) - {"ftz"}:
                raise self.unknown(f"conversion {'.'.join(rest)} from {source} to {to}")
            return self.set(operands[0], f"to_integer<{type}>({a}, {mode})")
        if (to, source, rest) == ("f32", "f64", ["rn", "ftz"]):
            return self.set(operands[0], f"flushed(static_cast<float>({a}))")
        if (to, source, rest) == ("f64", "f32", ["ftz"]):
            return self.set(operands[0], f"static_cast<double>(flushed({a}))")
        is_exact = not to_float or (to, source) == ("f64", "f32")  # an exact one has no rounding
        if rest != ([] if is_exact else ["rn"]):
            raise self.unknown(f"conversion {'.'.join(rest)} from {source} to {to}")
        return self.set(operands[0], f"static_cast<{type}>({a})")

    # ---- memory

    def do_ld(self, rest, types, operands) -> str:
        return self.access(rest, types, operands[1], operands[0], write=False)

    def do_st(self, rest, types, operands) -> str:
        return self.access(rest, types, operands[0], operands[1], write=True)

    HINTS = ("nc", "volatile", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1::evict_normal", "L1::no_allocate")

    def access(self, rest, types, address: str, registers: str, write: bool) -> str:
        space = next((m for m in rest if m in ("param", "global", "shared")), None)
        vector = next((int(m[1:]) for m in rest if re.fullmatch("v[248]", m)), 1)
        strange = [m for m in rest if m != space and not re.fullmatch("v[248]", m) and m not in self.HINTS]
        if space is None or strange or len(types) != 1:
            raise self.unknown(f"an access {'.'.join([*rest, *types])}")
        type = TYPES[types[0]]
        target = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", address)
        if target is None:
            raise self.unknown(f"address {address}")
        base, offset = target[1], int(target[2] or 0)
        names = split(registers[1:-1]) if registers.startswith("{") else [registers]
        if len(names) != vector:
            raise self.unknown(f"{len(names)} registers for {vector} numbers")
        if space == "param" and write:
            raise self.unknown("a store to a parameter")
        elif space == "param" and base not in self.parameters:  # a register with an address in one
            memory = f"load_parameter<{type}, {vector}>({self.value(base, 'uint64_t')} + {offset})"
        elif space == "param":
            _, size = self.parameters[base]
            width = vector * int(re.search(r"\d+", types[0])[0]) // 8
            if offset < 0 or offset + width > size:
                raise self.unknown(f"bytes {offset} to {offset + width} of a parameter of {size}")
            memory = f"load_parameter<{type}, {vector}>({self.bits(base)} + {offset})"
        else:
            width = "uint64_t" if space == "global" else "uint32_t"
            start = f"{width}({self.value(base, width)} + {width}({offset}))"
            if write:
                values = ", ".join(self.value(name, type) for name in names)
                return f"store<write_{space}>({start}, Vector<{type}, {vector}>{{{values}}}, {self.where});"
            memory = f"loaded<read_{space}, {type}, {vector}>({start}, {self.where})"
        moves = (self.set(name, f"memory.x[{i}]") for i, name in enumerate(names))
        return f"{{ const auto memory = {memory}; {' '.join(moves)} }}"

    def do_stmatrix(self, rest, types, operands) -> str:
        shape = [m for m in rest if m not in ("sync", "aligned", "shared", "m8n8")]
        if types != ["b16"] or shape not in (["x1"], ["x2"], ["x4"]) or "shared" not in rest:
            raise self.unknown("this stmatrix")
        address = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(\d+))?\s*\]", operands[0])
        start = f"{self.value(address[1], 'uint32_t')} + {address[2] or 0}u"
        values = ", ".join(self.value(part, "uint32_t") for part in split(operands[1].strip("{}")))
        return f"{{ const uint32_t values[] = {{{values}}}; store_matrices({start}, values, {self.where}); }}"

    # ---- control

    def do_bra(self, rest, types, operands) -> str:
        if set(rest) - {"uni"}:
            raise self.unknown("this bra")
        return f"goto {label_name(operands[0])};"

    def do_ret(self, rest, types, operands) -> str:
        return "return;"

    do_exit = do_ret

    def do_bar(self, rest, types, operands) -> str:
        if rest == ["warp", "sync"]:
            return f"meet({self.value(operands[0], 'uint32_t')}, {self.where});"
        if rest not in (["sync"], ["cta", "sync"], ["sync", "aligned"]) or operands != ["0"]:
            raise self.unknown("a barrier other than barrier 0 of all threads")
        return f"barrier({self.where});"

    do_barrier = do_bar

    def do_shfl(self, rest, types, operands) -> str:
        if rest[0] != "sync" or rest[1] not in ("up", "down", "bfly", "idx") or types != ["b32"]:
            raise self.unknown("this shfl")
        to, _, inside = operands[0].partition("|")
        value, b, c, mask = (self.value(x, "uint32_t") for x in operands[1:5])
        kind = rest[1][0]
        keep = f"{self.bits(inside.strip())} = inside;" if inside else ""
        call = f"shuffled('{kind}', {value}, {b}, {c}, {mask}, inside, {self.where})"
        return f"{{ bool inside = false; {self.set(to.strip(), call)} {keep} }}"


def split(text: str) -> list[str]:
    """Operands at the commas outside braces and brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if part.strip()]


def variable_of(register: str) -> str:
    return "r_" + register.lstrip("%").replace("$", "_")


def label_name(label: str) -> str:
    return "l_" + label.replace("$", "_")


def statements(code: str):
    """(line, text) of each: an instruction or directive without its semicolon, a label with its colon, a brace."""
    for match in re.finditer(r"\s*(?:([{}])|((?:@!?%\w+\s+)?[.\w$][^;:{}]*(?:\{[^}]*\}[^;:{}]*)*)([;:]))", code):
        line = code.count("\n", 0, match.end()) + 1
        yield line, match[1] or re.sub(r"\s+", " ", match[2]).strip() + (":" if match[3] == ":" else "")


def plain_name(mangled: str) -> str:
    """A kernel's name without namespaces, parameters and template arguments."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::", "", name)
    return re.sub(r"[<(].*", "", name, flags=re.S).split(" ")[-1].split("::")[-1]


def read(*texts: str) -> Module:
    """The kernels of some texts of PTX, translated."""
    module = Module()
    for text in texts:
        text = re.sub(r"//[^\n]*|^\s*\.loc\b[^\n]*", "", text, flags=re.M)  # .loc has no semicolon
        text = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.S)
        if re.search(r"\.(func|const|tex)\b|^\s*\.(?:visible\s+)?\.global\b", text, re.M):
            raise Unknown("PTX with functions, constants or global variables is not known to tests/cuda_on_cpu/ptx.py")
        for entry in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", text, re.S):
            translate(module, text, entry)
    return module


def translate(module: Module, text: str, entry: re.Match) -> None:
    mangled, header, code = entry[1], entry[2], body(text, entry.end())
    for alignment, variable, size in re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", code):
        offset = -(-module.shared_bytes // int(alignment)) * int(alignment)
        module.shared[variable], module.shared_bytes = offset, offset + int(size)
    for variable in re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]", text):
        module.shared.setdefault(variable, 0)
    parameters = {}
    for number, declared in enumerate(part for part in split(header) if part):
        match = re.fullmatch(r"\.param((?:\s+\.\w+|\s+\d+)*)\s+([\w$]+)(?:\[(\d+)\])?", declared)
        type = re.findall(r"\.([bufs]\d+)\b", match[1])[-1]
        parameters[match[2]] = number, int(re.search(r"\d+", type)[0]) // 8 * int(match[3] or 1)
    name = plain_name(mangled)
    if name in module.kernels:
        raise Unknown(f"two kernels are called {name}")
    kernel = Kernel(module, parameters)
    first_line = text.count("\n", 0, entry.end()) + 1
    lines = [f"void kernel_{name}([[maybe_unused]] const void* const* parameters) {{"]
    for line, statement in statements(code):
        kernel.line = first_line + line - 1
        lines.append(one(kernel, statement))
    module.kernels[name] = "\n".join([*lines, "}"])


def body(text: str, start: int) -> str:
    """The text between a brace that ends at `start` and the one that closes it."""
    depth = 1
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match[0] == "{" else -1
        if not depth:
            return text[start : start + match.start()]
    raise Unknown("PTX whose braces do not close")


def one(kernel: Kernel, statement: str) -> str:
    """A statement in C++."""
    if statement in ("{", "}"):
        return statement
    if statement.endswith(":"):
        return f"{label_name(statement[:-1])}:;"
    if registers := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement):
        kind = registers[1]
        type = TYPES.get(kind) or {"f16": "uint16_t", "bf16": "uint16_t"}[kind]
        type = {"float": "uint32_t", "double": "uint64_t"}.get(type, type)
        names = []
        for register in split(registers[2]):
            many = re.fullmatch(r"([%\w$]+)<(\d+)>", register)
            names += [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [register]
        kernel.registers.update(names)
        return f"[[maybe_unused]] {type} {', '.join(map(variable_of, names))};"
    if re.match(r"\.(shared|pragma)\b", statement):
        return ""
    match = re.fullmatch(r"(?:@(!?%\w+)\s+)?([a-z]\w*(?:[.:]+\w+)*)\s*(.*)", statement)
    if match is None:
        raise kernel.unknown(f"statement {statement!r}")
    kernel.module.opcodes[match[2]] = kernel.module.opcodes.get(match[2], 0) + 1
    text = kernel.instruction(match[2], split(match[3]))
    return f"if ({kernel.bits(match[1])}) {{ {text} }}" if match[1] else text


def to_cpp(*texts: str) -> str:
    """A source file with the kernels of some texts of PTX, which registers them under their names.

    Raises:
        Unknown: The PTX has what the translator does not know.
    """
    module = read(*texts)
    functions = "\n\n".join(module.kernels.values())
    names = ", ".join(f'{{"{name}", kernel_{name}}}' for name in module.kernels)
    return f"""#include "ptx_runtime.h"

namespace cuda_on_cpu {{
namespace {{

{functions}

}}  // namespace

std::map<std::string, Kernel>& translated() {{
  static std::map<std::string, Kernel> kernels{{{names}}};
  static const bool reserved = (reserve_shared({module.shared_bytes}), true);
  (void)reserved;
  return kernels;
}}

}}  // namespace cuda_on_cpu
"""
