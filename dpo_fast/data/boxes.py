"""Read the headers of images in boxes (ISO/IEC 14496-12): JPEG 2000 (ITU T.800) and AVIF with AV1's bitstream."""

import struct
from collections.abc import Iterator

from dpo_fast.data.header import OPENED, Header, Refused, up

# Peak bytes per pixel of decoding to RGB, as for `OPENED`.
AVIF = 24  # 16-bit planes, RGBA, a byte string of it
LONGEST_SEQUENCE_HEADER = 512  # bytes, in AV1; enough for 32 operating points of 44 bits and the fields around them
TILE_OF_JPEG2000 = 16 << 10  # bytes that OpenJPEG keeps per tile


def _boxes(data: bytes, place: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the ISO/IEC 14496-12 boxes in a range of `data`: name, start and end of the contents."""
    end = min(end, len(data))
    while place + 8 <= end:
        size, name = struct.unpack_from(">I4s", data, place)
        head = 8
        if size == 1:
            (size,), head = struct.unpack_from(">Q", data, place + 8), 16
        stop = end if size == 0 else place + size
        if size and size < head:
            raise ValueError("a box is damaged")
        yield name, place + head, min(stop, end)
        place = stop


def jpeg_2000(data: bytes) -> Header:
    width = height = 1
    codestream = 0
    if not data.startswith(b"\xff\x4f"):
        for name, start, end in _boxes(data, 0, len(data)):
            if name == b"jp2h":
                for inner, at, _ in _boxes(data, start, end):
                    if inner == b"ihdr":
                        height, width = struct.unpack_from(">II", data, at)
            elif name == b"jp2c":
                codestream = start
                break
        else:
            raise ValueError("no pixels: the file is cut off")
    right, bottom, left, top, across, down, x, y, parts = struct.unpack_from(">8IH", data, codestream + 8)
    width, height = max(width, right - left), max(height, bottom - top)
    if not (across and down):
        raise ValueError("its tiles have no size")
    tiles = up(max(right - x, 0), across) * up(max(bottom - y, 0), down)
    size = (OPENED + 6 * parts) * width * height + TILE_OF_JPEG2000 * tiles
    return Header("JPEG2000", width, height, size, 0, 1, data)


_TO_SAMPLES = (b"moov", b"trak", b"mdia", b"minf", b"stbl")


def avif(data: bytes) -> Header:
    sizes, coded = [(0, 0)], []
    for name, start, end in _boxes(data, 0, len(data)):
        if name == b"meta":
            inner = {box: (at, stop) for box, at, stop in _boxes(data, start + 4, end)}
            for at, stop in [inner[b"iprp"]] if b"iprp" in inner else []:
                for _, a, b in _boxes(data, at, stop):
                    sizes += [struct.unpack_from(">II", data, p + 4) for n, p, _ in _boxes(data, a, b) if n == b"ispe"]
            if b"iloc" in inner:
                coded += _items(data, inner[b"iloc"][0], inner.get(b"idat", (0, 0))[0])
        elif name == b"moov":
            coded += [data[place:] for place in _first_samples(data, start, end)]
    if sum(map(len, coded)) > 2 * len(data):
        raise Refused("has several items of the same bytes")
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    return Header("AVIF", width, height, AVIF * max(width * height, sum(map(_coded_pixels, coded))), 0, 1, data)


def _items(data: bytes, at: int, idat: int) -> Iterator[bytes]:
    """Yield the items listed in an `iloc` box; extents count from the start of the file or from `idat`."""
    version, sizes = data[at], struct.unpack_from(">H", data, at + 4)[0]
    offset, length, base, index = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15, sizes & 15 if version else 0
    place = at + 6

    def number(size: int) -> int:
        nonlocal place
        place += size
        if place > len(data):
            raise ValueError("the list of items is cut off")
        return int.from_bytes(data[place - size : place], "big")

    for _ in range(number(4 if version == 2 else 2)):
        number(4 if version == 2 else 2)
        inside = idat if version and number(2) & 15 == 1 else 0
        number(2)
        begin, parts = number(base) + inside, []
        for _ in range(number(2)):
            number(index)
            start, size = begin + number(offset), number(length)
            parts.append(data[start : start + size] if size else data[start:])
            if sum(map(len, parts)) > len(data):
                raise Refused("has an item of the same bytes several times")
        yield b"".join(parts)


def _first_samples(data: bytes, start: int, end: int) -> Iterator[int]:
    """Yield the offset of the first sample of each track."""
    for name, at, stop in _boxes(data, start, end):
        if name in _TO_SAMPLES:
            yield from _first_samples(data, at, stop)
        elif name in (b"stco", b"co64"):
            yield struct.unpack_from(">I" if name == b"stco" else ">Q", data, at + 8)[0]


def _coded_pixels(data: bytes) -> int:
    """Return the most pixels per frame that an item's AV1 sequence headers allow; 0 if it has none."""
    place = most = 0
    while place + 1 < len(data):
        kind, extended, sized = data[place] >> 3 & 15, data[place] & 4, data[place] & 2
        place += 2 if extended else 1
        size = len(data) - place
        if sized:
            size = shift = 0
            while True:
                size |= (data[place] & 127) << shift
                shift, place = shift + 7, place + 1
                if data[place - 1] < 128:
                    break
        if kind == 1:
            most = max(most, _sequence_pixels(data[place : place + min(size, LONGEST_SEQUENCE_HEADER)]))
        place += size
    return most


def _sequence_pixels(header: bytes) -> int:
    """Return the maximum width times height in an AV1 sequence header (section 5.5.1 of the specification)."""
    bits, place = int.from_bytes(header, "big"), 8 * len(header)

    def read(count: int) -> int:
        nonlocal place
        place -= count
        if place < 0:
            raise ValueError("a sequence header is cut off")
        return bits >> place & (1 << count) - 1

    read(3 + 1)  # profile, still picture
    if read(1):  # reduced header
        read(5)
    else:
        delay = 0
        model = False
        if read(1):  # timing
            read(64)
            if read(1):  # equal intervals: a number in unary and binary
                zeros = 0
                while not read(1):
                    zeros += 1
                read(min(zeros, 32))
            if model := bool(read(1)):
                delay = read(5) + 1
                read(32 + 5 + 5)
        displayed = read(1)
        for _ in range(read(5) + 1):
            read(12)
            if read(5) > 7:
                read(1)
            if model and read(1):
                read(2 * delay + 1)
            if displayed and read(1):
                read(4)
    across, down = read(4) + 1, read(4) + 1
    return (read(across) + 1) * (read(down) + 1)
