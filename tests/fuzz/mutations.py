"""Hypothesis strategies that turn valid files into invalid ones.

A case is a set of changes to the files of a reader: new bytes, or something else in the place of the file. Changes know
the formats: values of JSON, of signed JSON and of safetensors headers are replaced and, where a digest covers them,
signed again; PNG chunks and JPEG segments are inserted with correct checksums; tables get columns of other types.
"""

import io
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from dpo_fast.checksums import parse_signed, signed

OUTSIDE = "../outside"  # a folder beside the reader's; nothing in it may be opened


class Special(NamedTuple):
    """What stands in the place of a file."""

    kind: str  # "missing", "folder", "fifo", "link"
    target: str = ""  # of a link


Change = bytes | Special
Changes = dict[str, Change]

_SPECIALS = (
    Special("missing"),
    Special("folder"),
    Special("fifo"),
    Special("link", "nowhere"),
    Special("link", "."),
    Special("link", "/dev/zero"),
    Special("link", OUTSIDE + "/{name}"),
    Special("link", "{name}"),  # to itself
)

_DEEP = 100_000
_RAW = (  # values as they stand in JSON
    *(
        "null",
        "true",
        "false",
        "0",
        "-1",
        "1",
        "1.5",
        "1e999",
        "-1e-400",
        "NaN",
        "Infinity",
        "9" * 5000,
        "0." + "3" * 5000,
    ),
    *(str(2**31), str(2**63), str(-(2**63)), str(2**64), str(2**1000), "1e308", "[]", "{}", "[[]]", '[""]', "[null]"),
    *('""', '"0"', '"NaN"', '"' + "x" * 500 + '"', '"' + "a/" * 3000 + '"', '"\\ud800"', '"\\u0000"', '"\\u001b[31m"'),
    *('"/etc/hostname"', '"~"', '"~nobody/x"', '"."', '".."', '"a\\nb"', '"$HOME"', '"a::b"', '"file:///etc/hostname"'),
    *(f'"{OUTSIDE}"', f'"{OUTSIDE}/{{name}}"', f'"../{OUTSIDE}/{{name}}"', '"{outside}/{name}"', '"{outside}"'),
    *("[" * _DEEP + "]" * _DEEP, '{"a":' * _DEEP + "1" + "}" * _DEEP, "[" + "0," * 20_000 + "0]"),
    *("[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900),
)
_MARK = "\u2603raw\u2603"
_EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_YAML = (
    *("a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n", "&a [*a]", "&x {seed: *x}", "? [a, b]\n: 1"),
    *("seed: 2001-13-45", "seed: 2001-01-01", "seed: !!int x", "seed: !!float x", "seed: !!binary x", "seed: 1:99:99"),
    *("!!python/object/apply:os.system [ls]", "!!python/name:os.system", "!!set {a}", "!!omap [1]", "!!timestamp x"),
    *(
        "seed: !!bool maybe",
        "seed: " + "9" * 5000,
        "seed: 0x" + "f" * 5000,
        "seed: 0b2",
        "- 1",
        "---\n---\n",
        "%YAML 9.9\n---",
    ),
    *(
        "[" * 5000,
        "- " * 5000,
        "{a: " * 5000,
        "seed:",
        "seed: ''",
        "<<: 1",
        "<<: [1]",
        "{<<: {<<: {a: 1}}}",
        "\tseed: 1",
    ),
    *("train_batch_size: yes", "1: 2", "null: 1", "[1]: 2", "{a: b}: 1", "lora_targets: [[a]]", "lora_targets: {a: 1}"),
    *(
        "prompt: \ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
        "\x85",
        "\u2028",
        "\ufeff",
        "\0",
        "\x1b[31m",
    ),
    "x0: &x0 [lol]\n"
    + "".join(f"x{k}: &x{k} [{', '.join([f'*x{k - 1}'] * 10)}]\n" for k in range(1, 12))
    + "seed: *x11",
)


def changes(
    files: Mapping[str, bytes],
    spare: tuple[bytes, ...],  # files of any format, to splice in
    outside: str,  # the absolute path of OUTSIDE
) -> st.SearchStrategy[Changes]:
    """One to three changes to a reader's files."""
    return _changes(files, spare, outside)


@st.composite
def _changes(draw: Callable, files: Mapping[str, bytes], spare: tuple[bytes, ...], outside: str) -> Changes:
    found: Changes = {}
    names = st.sampled_from(sorted(files))
    for _ in range(draw(st.integers(1, 3))):
        name = draw(names)
        data = found.get(name, files[name])
        if isinstance(data, Special):
            continue
        if draw(st.integers(0, 19)) == 0:
            special = draw(st.sampled_from(_SPECIALS))
            found[name] = special._replace(target=special.target.format(name=name.rsplit("/", 1)[-1]))
            continue
        if draw(st.integers(0, 19)) == 0:
            other = draw(names)  # the files exchange their places
            before = found.get(other, files[other])
            if not isinstance(before, Special):
                found[name], found[other] = before, data
            continue
        by_format = _BY_FORMAT.get(name.rsplit(".", 1)[-1])
        if by_format is not None and draw(st.integers(0, 2)):
            changed = by_format(draw, data, {"name": name.rsplit("/", 1)[-1], "outside": outside})
            if changed is not None:
                found[name] = changed
                continue
        found[name] = _bytes(draw, data, spare)
    return found


# ---- bytes -------------------------------------------------------------------------------------------------------


def _bytes(draw: Callable, data: bytes, spare: tuple[bytes, ...]) -> bytes:
    kind = draw(
        st.sampled_from(("flip", "cut", "cut", "splice", "insert", "zero", "number", "exchange", "encode", "repeat"))
    )
    size = len(data)
    place = draw(st.integers(0, size))
    if kind == "cut":
        return data[:place]
    if kind == "splice":
        other = draw(st.sampled_from(spare))
        start = draw(st.integers(0, len(other)))
        return data[:place] + other[start : start + draw(st.integers(1, 4096))] + data[place:]
    if kind == "insert":
        return data[:place] + draw(st.binary(min_size=1, max_size=64)) + data[place:]
    if kind == "zero":
        length = draw(st.integers(1, 512))
        return data[:place] + bytes(min(length, size - place)) + data[place + length :]
    if kind == "number":
        value, width = draw(st.sampled_from(_EXTREMES)), draw(st.sampled_from((1, 2, 4, 8)))
        order = draw(st.sampled_from(("little", "big")))
        return data[:place] + (value % 256**width).to_bytes(width, order) + data[place + width :]
    if kind == "exchange":
        other, length = draw(st.integers(0, size)), draw(st.integers(1, 64))
        first, second = sorted((place, other))
        length = min(length, second - first, size - second)
        a, b = data[first : first + length], data[second : second + length]
        return data[:first] + b + data[first + length : second] + a + data[second + length :]
    if kind == "encode":
        return _encoded(draw, data)
    if kind == "repeat":
        length = draw(st.integers(1, 256))
        return data[:place] + data[place : place + length] * draw(st.sampled_from((2, 10, 100))) + data[place:]
    flipped = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        if size:
            flipped[draw(st.integers(0, size - 1))] ^= draw(st.integers(1, 255))
    return bytes(flipped)


def _encoded(draw: Callable, data: bytes) -> bytes:
    text = data.decode("utf-8", "replace")
    encoding = draw(st.sampled_from(("utf-16", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "cp037", "utf-7")))
    letter = draw(st.sampled_from(("", "é", "\u2028", "\ud800")))
    return (letter + text).encode(
        encoding, "surrogatepass" if encoding.startswith("utf-") and encoding != "utf-7" else "replace"
    )


# ---- JSON --------------------------------------------------------------------------------------------------------


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values in a JSON value, the whole one first; of long lists the first few."""
    found = [path]
    parts = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, part in parts[:12]:
        found += _places(part, (*path, key))
    return found


def _json_text(draw: Callable, text: str, names: Mapping[str, str]) -> str | None:
    """A JSON value's text with some value in it replaced, removed, exchanged or given twice; None: it is no JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    places = _places(value)
    where = draw(st.sampled_from(places))
    raw = draw(st.one_of(st.sampled_from(_RAW), st.sampled_from(_RAW), _drawn))
    for word, meant in names.items():
        raw = raw.replace("{" + word + "}", meant)
    if not where:
        return raw
    holder = value
    for key in where[:-1]:
        holder = holder[key]
    kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "twice", "exchange")))
    if kind == "remove":
        del holder[where[-1]]
        return json.dumps(value)
    if kind == "exchange":
        other = draw(st.sampled_from([place for place in places if place]))
        second = value
        for key in other[:-1]:
            second = second[key]
        if where != other[: len(where)] and other != where[: len(other)]:
            holder[where[-1]], second[other[-1]] = second[other[-1]], holder[where[-1]]
        return json.dumps(value)
    if kind in ("rename", "twice") and isinstance(holder, dict):
        if kind == "rename":
            name = draw(st.sampled_from(["", "x" * 500, "\ud800", "../outside/x", "__metadata__", "digest", "\n"]))
            holder[name] = holder.pop(where[-1])
            return json.dumps(value)
        holder[_MARK] = 0
        return json.dumps(value).replace(f'"{json.dumps(_MARK)[1:-1]}": 0', f"{json.dumps(where[-1])}: {raw}")
    holder[where[-1]] = _MARK
    return json.dumps(value).replace(json.dumps(_MARK), raw)


_drawn = st.one_of(
    st.integers().map(str),
    st.floats().map(json.dumps),
    st.text(max_size=12).map(json.dumps),
    st.lists(st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.text(max_size=3)), max_size=4).map(json.dumps),
)


def _json(draw: Callable, data: bytes, names: Mapping[str, str]) -> bytes | None:
    """A JSON file, signed again where it was signed (three times of four)."""
    try:
        value = parse_signed(data)
    except (ValueError, RecursionError):
        text = _json_text(draw, data.decode("utf-8", "replace"), names)
        return None if text is None else _to_bytes(text)
    value.pop("digest", None)
    text = _json_text(draw, json.dumps(value, separators=(",", ":")), names)
    if text is None:
        return None
    return _to_bytes(signed(text)) if draw(st.integers(0, 3)) else _to_bytes(text)


def _to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _json_lines(draw: Callable, data: bytes, names: Mapping[str, str]) -> bytes | None:
    lines = data.splitlines()
    if not lines:
        return None
    number = draw(st.integers(0, len(lines) - 1))
    text = _json_text(draw, lines[number].decode("utf-8", "replace"), names)
    if text is None:
        return None
    return b"\n".join([*lines[:number], _to_bytes(text), *lines[number + 1 :]]) + b"\n"


def _safetensors(draw: Callable, data: bytes, names: Mapping[str, str]) -> bytes | None:
    """The header's JSON changed, its length adjusted or not."""
    if len(data) < 8:
        return None
    size = int.from_bytes(data[:8], "little")
    if size > len(data) - 8:
        return None
    text = _json_text(draw, data[8 : 8 + size].decode("utf-8", "replace"), names)
    if text is None:
        return None
    header = _to_bytes(text)
    length = draw(st.sampled_from((len(header),) * 6 + (size, 2**63, 2**64 - 1, 100_000_001, 0)))
    return length.to_bytes(8, "little") + header + data[8 + size :]


# ---- texts -------------------------------------------------------------------------------------------------------


def _yaml(draw: Callable, data: bytes, names: Mapping[str, str]) -> bytes:
    lines = data.decode("utf-8", "replace").splitlines()
    for _ in range(draw(st.integers(1, 2))):
        line = draw(st.one_of(st.sampled_from(_YAML), st.text(max_size=20)))
        if draw(st.booleans()) and lines:
            number = draw(st.integers(0, len(lines) - 1))
            key = lines[number].partition(":")[0]
            value = line.partition(": ")[2] or line
            lines[number] = f"{key}: {value}"
        else:
            lines.insert(draw(st.integers(0, len(lines))), line)
    return _to_bytes("\n".join(lines))


def _table_text(draw: Callable, data: bytes, names: Mapping[str, str]) -> bytes:
    lines = data.decode("utf-8", "replace").splitlines()
    line = draw(
        st.sampled_from(("", "\t" * 50, "\0", "\r", "x" * 200_000, '"', "\x1b[31m", "Prompt", "\u2028", "\ufeff", "\t"))
    )
    number = draw(st.integers(0, len(lines)))
    return _to_bytes("\n".join([*lines[:number], line, *lines[number:]]))


# ---- tables ------------------------------------------------------------------------------------------------------

_ODD: tuple[tuple[pa.DataType, Any], ...] = (
    *((pa.null(), None), (pa.bool_(), True), (pa.int8(), -1), (pa.int64(), 2**62), (pa.uint64(), 2**64 - 1)),
    *((pa.float16(), 0.5), (pa.float32(), float("nan")), (pa.float64(), float("inf")), (pa.float64(), 0.7)),
    *(
        (pa.string(), "x\x1b[31m\n" * 50),
        (pa.string(), ""),
        (pa.large_string(), "x"),
        (pa.binary(), b""),
        (pa.binary(), b"\xff\xd8"),
    ),
    *((pa.large_binary(), b"GIF89a"), (pa.binary(3), b"abc"), (pa.list_(pa.int8()), [1]), (pa.list_(pa.string()), [])),
    *((pa.struct([("bytes", pa.binary()), ("path", pa.string())]), {"bytes": None, "path": "/etc/hostname"}),),
    *((pa.struct([("bytes", pa.string())]), {"bytes": "x"}), (pa.struct([("path", pa.int64())]), {"path": 1})),
    *((pa.timestamp("ns"), 2**62), (pa.date32(), 1), (pa.decimal128(5, 2), None), (pa.duration("s"), 5)),
    *(
        (pa.dictionary(pa.int8(), pa.string()), "x"),
        (pa.map_(pa.string(), pa.int8()), [("a", 1)]),
        (pa.time64("us"), 1),
    ),
)


def _odd_table(draw: Callable, table: pa.Table) -> pa.Table:
    if not table.num_columns:  # an earlier change left none
        return table
    number = draw(st.integers(0, table.num_columns - 1))
    name = table.column_names[number]
    kind = draw(st.sampled_from(("type", "type", "nulls", "rename", "drop", "twice", "none", "metadata")))
    if kind == "drop":
        return table.drop_columns([name])
    if kind == "none":
        return table.slice(0, 0)
    if kind == "metadata":
        value = draw(
            st.sampled_from((b"{}", b"", b'{"info": {"features": {"x": {"_type": "Image"}}}}', b"[" * 9999, b"\xff"))
        )
        return table.replace_schema_metadata({b"huggingface": value})
    if kind == "rename":
        new = draw(st.sampled_from(("", "x" * 500, "a\nb", "\x1b[31m", "caption", "jpg_0", "a.b", "__index_level_0__")))
        return table.rename_columns([new if column == name else column for column in table.column_names])
    if kind == "twice":
        return table.append_column(name, table.column(number))
    if kind == "nulls":
        return table.set_column(number, name, pa.nulls(len(table), table.schema.field(number).type))
    type_, value = draw(st.sampled_from(_ODD))
    return table.set_column(number, name, pa.array([value] * len(table), type_))


def _parquet(draw: Callable, data: bytes, names: Mapping[str, str]) -> bytes | None:
    try:
        table = _odd_table(draw, pq.read_table(io.BytesIO(data)))
        sink = io.BytesIO()
        pq.write_table(table, sink, compression=draw(st.sampled_from(("none", "snappy", "zstd"))))
    except (pa.ArrowException, OSError, ValueError, KeyError):  # damaged before, or a type that parquet lacks
        return None
    return sink.getvalue()


def _arrow(draw: Callable, data: bytes, names: Mapping[str, str]) -> bytes | None:
    try:
        with pa.ipc.open_stream(data) as reader:
            table = _odd_table(draw, reader.read_all())
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return None
    return sink.getvalue()


# ---- images ------------------------------------------------------------------------------------------------------

_PIECES = (
    *(b"", b"\0" * 40, b"\xff" * 300, b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\x01\0\0\0\x09\0\0\0" * 50),
    *(b"ICC_PROFILE\0\x01\xff" + b"x" * 200, b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\xff\xff\xff\xff\0\x06\0\0\0\0\0\0"),
    *(
        b"a\0\0" + zlib.compress(bytes(1 << 24)),
        b"icc\0\0" + zlib.compress(b"\xff" * 4000),
        b"http://ns.adobe.com/xap/1.0/\0<x",
    ),
    *(
        struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0),
        struct.pack(">IIBBBBB", 9000, 9000, 16, 6, 0, 0, 1),
    ),
    *(
        struct.pack(">IIBBBBB", 16, 16, 16, 0, 0, 0, 0),
        struct.pack(">IIBBBBB", 0, 1, 8, 3, 0, 0, 0),
        struct.pack(">II", 3, 0),
    ),
)
_CHUNKS = (
    b"IHDR",
    b"PLTE",
    b"IDAT",
    b"IEND",
    b"tRNS",
    b"iCCP",
    b"eXIf",
    b"zTXt",
    b"iTXt",
    b"tEXt",
    b"acTL",
    b"fcTL",
    b"gAMA",
    b"cHRM",
)


def _png(draw: Callable, data: bytes, names: Mapping[str, str]) -> bytes | None:
    """Chunks inserted, removed, exchanged or filled with other bytes; the checksums fit."""
    chunks, place = [], 8
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    if not chunks:
        return None
    number = draw(st.integers(0, len(chunks) - 1))
    kind = draw(st.sampled_from(("insert", "insert", "fill", "remove", "name", "bytes")))
    if kind == "insert":
        body = draw(st.one_of(st.sampled_from(_PIECES), st.binary(max_size=64)))
        chunks.insert(number, (draw(st.sampled_from(_CHUNKS)), body))
    elif kind == "remove":
        del chunks[number]
    else:
        name, body = chunks[number]
        if kind == "fill":
            body = draw(st.sampled_from(_PIECES))
        elif kind == "name":
            name = draw(st.sampled_from(_CHUNKS))
        else:
            body = _bytes(draw, body, (data,))
        chunks[number] = name, body
    out = [data[:8]]
    for name, body in chunks:
        out.append(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))
    return b"".join(out)


def _jpeg(draw: Callable, data: bytes, names: Mapping[str, str]) -> bytes:
    """A segment more behind the start."""
    body = draw(st.one_of(st.sampled_from(_PIECES), st.binary(max_size=64)))[:65_000]
    marker = draw(st.sampled_from((0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE, 0xC0, 0xC2, 0xC4, 0xDB, 0xDA, 0xDD)))
    length = draw(st.sampled_from((len(body) + 2, len(body) + 2, 0, 1, 2, 65535)))
    return data[:2] + bytes((0xFF, marker)) + length.to_bytes(2, "big") + body + data[2:]


_BY_FORMAT: dict[str, Callable] = {
    "json": _json,
    "jsonl": _json_lines,
    "log": _json_lines,
    "safetensors": _safetensors,
    "yaml": _yaml,
    "tsv": _table_text,
    "txt": _table_text,
    "parquet": _parquet,
    "arrow": _arrow,
    "png": _png,
    "jpg": _jpeg,
}
