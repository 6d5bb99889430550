"""Read from an image's header what decoding will cost, and drop from the file what decoding does not need.

PIL allocates what a header asks for, some of it as soon as a file is opened, and reads all metadata, which a small file
can make expensive: values that many entries share (EXIF, TIFF), segments to join (a JPEG's EXIF, a GIF's comments),
compressed texts. Here a header is read once, in time and memory that depend on the file's size alone. PIL is not given
the comments, texts, EXIF and further frames of a JPEG or PNG, nor the comments before a GIF's first image; EXIF's
orientation is read here.

Formats: ITU T.81 (JPEG), W3C PNG, GIF89a, RFC 9649 (WebP), TIFF 6.0 and BigTIFF, ITU T.800 (JPEG 2000), ISO/IEC
14496-12 and 23008-12 with AV1's bitstream specification (AVIF).
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator

from dpo_fast.data.boxes import avif, jpeg_2000
from dpo_fast.data.header import OPENED, Header, Refused, up

PNG = b"\x89PNG\r\n\x1a\n"  # what a PNG begins with
LEAST_BITS_A_BLOCK = 1  # in a JPEG: a Huffman code has at least one bit, and a block's DC coefficient takes one code
MAX_SCANS = 64  # in a JPEG; each passes over the complete image, and encoders write about ten
MAX_SEGMENTS = 10_000  # in a JPEG's header; more than any encoder writes
MAX_TEXT = 1 << 20  # bytes read, after inflating, of a PNG's text that may hold an orientation

# Peak bytes per pixel of decoding to RGB, decoder and result together, as measured by benchmarks/bombs.py.
WEBP = 24  # two canvases, the decoder's own picture, a byte string of the frame


def read_header(data: bytes) -> Header:
    """Read the header of an encoded image. Raises Refused if it must not be decoded, ValueError if it is no image."""
    for is_format, read in _READERS:
        if is_format(data):
            try:
                return read(data)
            except (struct.error, LookupError, OverflowError) as error:  # the last for an offset of 64 bits
                raise ValueError("the header is damaged or cut off") from error
    raise ValueError("cannot identify the image: its format is none of those that are read")


def orientation_of_exif(exif: bytes) -> int:
    """The orientation (1 to 8) in an EXIF block's first directory; 0 if there is none or it cannot be read."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    try:
        if order is None:
            return 0
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(order + "HHI", exif, place)
            if tag == 274 and number == 1 and kind in (1, 3, 4):
                (value,) = struct.unpack_from(order + {1: "B", 3: "H", 4: "I"}[kind], exif, place + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:  # cut off
        pass
    return 0


def orientation_of_xmp(xmp: bytes) -> int:
    """The orientation (1 to 8) in an XMP packet; 0 if there is none."""
    match = re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp)
    return int(match[1]) if match else 0


# ---- JPEG ------------------------------------------------------------------------------------------------------------

_STARTS_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


def _jpeg(data: bytes) -> Header:
    kept, place, frame, first_scan = [data[:2]], 2, None, None
    exif = xmp = b""
    for _ in range(MAX_SEGMENTS):
        start = data.find(b"\xff", place)
        if start < 0:
            raise ValueError("no pixels: the file is cut off")
        marker = start + 1
        while data[marker] == 0xFF:  # padding
            marker += 1
        code = data[marker]
        if code in (0x00, 0x01, *range(0xD0, 0xD9)):  # a marker without a segment
            place = marker + 1
            continue
        if code == 0xD9:
            break
        (length,) = struct.unpack_from(">H", data, marker + 1)
        end = marker + 1 + length
        body = data[marker + 3 : end]
        if code == 0xDA:
            first_scan = body
            kept.append(data[start:])
            break
        if code in _STARTS_OF_FRAME:
            if frame is not None:
                raise Refused("has two frame headers")
            frame = (code, body)
        elif code == 0xE1 and body.startswith(b"Exif\0\0"):
            exif = exif or body
        elif code == 0xE1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = xmp or body
        if not (0xE0 <= code <= 0xEF or code == 0xFE) or _needed(code, body):
            kept.append(b"\xff" + data[marker:end])
        place = end
    else:
        raise Refused(f"has more than {MAX_SEGMENTS} segments before its pixels")
    if frame is None or first_scan is None:
        raise ValueError("no pixels: the file is cut off")
    code, body = frame
    height, width, count = struct.unpack_from(">HHB", body, 1)
    factors = [(body[7 + 3 * k] >> 4, body[7 + 3 * k] & 15) for k in range(count)]
    if not factors or min(min(pair) for pair in factors) < 1:
        raise ValueError("the frame header is damaged")
    across, down = (max(pair[axis] for pair in factors) for axis in (0, 1))
    blocks = up(width, 8 * across) * up(height, 8 * down) * sum(a * b for a, b in factors)
    _check_jpeg(data, code, blocks, width, height)
    several = code in (0xC2, 0xC6, 0xCA, 0xCE) or first_scan[0] < count  # libjpeg then keeps all coefficients in memory
    coefficients = 128 * blocks if several else 0
    orientation = orientation_of_exif(exif) or orientation_of_xmp(xmp) or 1
    peak = OPENED * width * height + coefficients
    return Header("JPEG", width, height, peak, coefficients, orientation, b"".join(kept))


def _needed(code: int, body: bytes) -> bool:
    """Whether an application segment affects pixels: JFIF and Adobe name the colour space, ICC holds a profile."""
    return code in (0xE0, 0xEE) or (code == 0xE2 and body.startswith(b"ICC_PROFILE\0"))


def _check_jpeg(data: bytes, code: int, blocks: int, width: int, height: int) -> None:
    scans = data.count(b"\xff\xda")  # never within coefficients, where 0xff is followed by 0
    if scans > MAX_SCANS:
        raise Refused(f"comes in {scans} scans; the limit is {MAX_SCANS}")
    if code < 0xC8 and 8 * len(data) < LEAST_BITS_A_BLOCK * blocks:  # codes above: arithmetic coding, which needs less
        raise Refused(
            f"has {len(data)} bytes for {width} x {height} pixels, less than a bit for each of its {blocks} blocks"
        )


XMP, RAW_PROFILE = b"XML:com.adobe.xmp", b"Raw profile type exif"  # the latter is how ImageMagick writes EXIF


# ---- PNG -------------------------------------------------------------------------------------------------------------


def _png(data: bytes) -> Header:
    width, height = struct.unpack_from(">II", data, 16)
    kept, left_out, place, exif, texts = [data[:8]], False, 8, b"", {}
    while place + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if name[0] & 0x20 == 0 or name in (b"tRNS", b"iCCP"):  # critical, or affects pixels
            kept.append(data[place:end])
        else:
            left_out = True
            if name == b"eXIf":
                exif = exif or data[place + 8 : end - 4]
            elif name in (b"iTXt", b"zTXt", b"tEXt"):
                key, text = _text(name, data[place + 8 : end - 4])
                texts.setdefault(key, text)
        place = end
        if name == b"IEND":
            break
    exif = exif or _of_raw_profile(texts.get(RAW_PROFILE, b""))
    orientation = orientation_of_exif(exif) or orientation_of_xmp(texts.get(XMP, b"")) or 1
    return Header("PNG", width, height, OPENED * width * height, 0, orientation, b"".join(kept) if left_out else data)


def _text(name: bytes, body: bytes) -> tuple[bytes, bytes]:
    """Return the key and text of a chunk, both empty if it cannot hold an orientation."""
    key, _, rest = body.partition(b"\0")
    if key not in (XMP, RAW_PROFILE):
        return b"", b""
    packed = name == b"zTXt"
    if name == b"iTXt":
        packed, rest = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    elif packed:
        rest = rest[1:]
    try:
        return key, zlib.decompressobj().decompress(rest, MAX_TEXT) if packed else rest[:MAX_TEXT]
    except zlib.error:
        return key, b""


def _of_raw_profile(text: bytes) -> bytes:
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


# ---- GIF, BMP, WebP --------------------------------------------------------------------------------------------------


def _gif(data: bytes) -> Header:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    place = 13 + (3 << (flags & 7) + 1 if flags & 128 else 0)
    kept = [data[:place]]
    while data[place] != 0x2C:
        if data[place] == 0x3B:
            raise ValueError("there is no image in it")
        if data[place] != 0x21:  # PIL skips it, too
            place += 1
            continue
        start, place = place, place + 2
        while size := data[place]:
            place += 1 + size
        place += 1
        if data[start + 1] == 0xF9:  # which colour is transparent
            kept.append(data[start:place])
    left, top, across, down = struct.unpack_from("<HHHH", data, place + 1)
    kept.append(data[place:])
    width, height = max(width, left + across), max(height, top + down)
    return Header("GIF", width, height, OPENED * width * height, 0, 1, b"".join(kept))


def _bmp(data: bytes) -> Header:
    (size,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if size == 12 else "<ii", data, 18)
    width, height = abs(width), abs(height)
    return Header("BMP", width, height, OPENED * width * height, 0, 1, data)


def _webp(data: bytes) -> Header:
    width = height = 1
    exif = xmp = 0
    for name, start, end in _riff_chunks(data):
        if name == b"VP8X":
            a, b = (int.from_bytes(data[place : place + 3], "little") for place in (start + 4, start + 7))
            width, height = max(width, a + 1), max(height, b + 1)
        elif name == b"VP8 ":
            a, b = struct.unpack_from("<HH", data, start + 6)
            width, height = max(width, a & 0x3FFF), max(height, b & 0x3FFF)
        elif name == b"VP8L":
            (bits,) = struct.unpack_from("<I", data, start + 1)
            width, height = max(width, (bits & 0x3FFF) + 1), max(height, (bits >> 14 & 0x3FFF) + 1)
        elif name == b"EXIF":
            exif = exif or orientation_of_exif(data[start:end])
        elif name == b"XMP ":
            xmp = xmp or orientation_of_xmp(data[start:end])
    return Header("WEBP", width, height, WEBP * width * height, 0, exif or xmp or 1, data)


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    place = 12
    while place + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, place)
        yield name, place + 8, place + 8 + size
        place += 8 + size + size % 2


# ---- TIFF ------------------------------------------------------------------------------------------------------------

_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_TIFF_NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
_DIRECTORIES = (34665, 34853)  # of EXIF and GPS, which PIL reads with the image


def _tiff(data: bytes) -> Header:
    order = "<" if data[:2] == b"II" else ">"
    big = data[2] == 43  # PIL's rule
    (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    tags, size = _directory(data, start, order, big)
    for tag in _DIRECTORIES:
        if tag in tags:
            size += _directory(data, tags[tag], order, big)[1]
    if size > len(data):
        raise Refused(f"has tags of {size} bytes in a file of {len(data)}: several share the same values")
    width, height, samples = tags[256], tags[257], tags.get(277, 1)
    bits = tags.get(258, 1)
    area = max(width * height, tags.get(322, 0) * tags.get(323, 0))  # a tile is decoded in one piece, and so is a strip
    buffer = area * samples * bits // 8 if tags.get(259, 1) != 1 else 0
    return Header("TIFF", width, height, OPENED * width * height + buffer, 0, 1, data)


def _directory(data: bytes, start: int, order: str, big: bool) -> tuple[dict[int, int], int]:
    """Return a directory's numeric tags (the first number of each) and the bytes of values stored outside it."""
    count, entry, head, inside = ("Q", "HHQ", 8, 8) if big else ("H", "HHI", 2, 4)
    (entries,) = struct.unpack_from(order + count, data, start)
    step = struct.calcsize("=" + entry) + inside
    if start + head + entries * step > len(data):
        raise ValueError("a directory is cut off")
    tags, total = {}, 0
    for place in range(start + head, start + head + entries * step, step):
        tag, kind, number = struct.unpack_from(order + entry, data, place)
        size, value = number * _TIFF_SIZES.get(kind, 0), place + step - inside
        if size > inside:
            total += size
            (value,) = struct.unpack_from(order + ("Q" if big else "I"), data, value)
        if kind in _TIFF_NUMBERS and number and tag not in tags and value + _TIFF_SIZES[kind] <= len(data):
            (tags[tag],) = struct.unpack_from(order + _TIFF_NUMBERS[kind], data, value)
    return tags, total


_READERS: list[tuple[Callable[[bytes], bool], Callable[[bytes], Header]]] = [
    (lambda data: data.startswith(b"\xff\xd8\xff"), _jpeg),
    (lambda data: data.startswith(PNG), _png),
    (lambda data: data[:6] in (b"GIF87a", b"GIF89a"), _gif),
    (lambda data: data.startswith(b"BM"), _bmp),
    (lambda data: data[:4] == b"RIFF" and data[8:12] == b"WEBP", _webp),
    # PIL does not read big-endian (MM) BigTIFF
    (lambda data: data[:2] in (b"II", b"MM") and data[2:4] in (b"\0*", b"*\0", b"+\0"), _tiff),
    (lambda data: data.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")), jpeg_2000),
    (lambda data: data[4:12] in (b"ftypavif", b"ftypavis", b"ftypmif1", b"ftypmsf1"), avif),
]
