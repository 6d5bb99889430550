"""The images of a session as the browser gets them: encoded anew, all of one size, all responses of one length.

Every file is decoded as the trainer decodes it, scaled into one box and written as JPEG (quality 95, colour in full
resolution, no metadata). The results are kept beside the file of votes, with digests, so that starting again is quick.
Comment segments of random bytes pad every response to one length: a sharper picture is nearly always the longer file.
"""

import hashlib
import io
import os
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from dpo_fast.checksums import png_is_whole, read_signed_json, write_signed_json
from dpo_fast.data.header import Refused
from dpo_fast.data.headers import read_header
from dpo_fast.data.images import BadImage, decode
from dpo_fast.errors import BadInput
from dpo_fast.files import atomic_file, is_inside, read_bytes
from dpo_fast.votes.store import ImageFile

QUALITY = 95
SMALLEST, LARGEST = 256, 1024  # pixels of the longer side, unless one is asked for
GREY = (128, 128, 128)  # beside an image of another shape than the box
LISTING = "images.json"
TILES, BLURRED = 6, 16  # of a ruined copy: tiles a side, which change places; pixels a side to which it is reduced
COMMENT = 65533  # bytes in one JPEG comment, at most
PADDING = 36  # bytes of the longest image, at least: 32 are random, so that no response is ever repeated
FORMAT = 1  # of the kept images; any change of the pixels must change it


class Size(NamedTuple):
    """The box in which every image is shown, in pixels."""

    width: int
    height: int


class Prepared(NamedTuple):
    """An image that is ready to be sent, but for its padding."""

    file: Path
    length: int  # bytes
    digest: str


@dataclass(frozen=True)
class Gallery:
    """All images of a session."""

    size: Size
    length: int  # bytes of every response
    images: dict[tuple[Path, bool], Prepared]  # by file, and whether it is the ruined copy
    sources: dict[Path, ImageFile]  # the files as they were read
    broken: dict[Path, str]  # files that cannot be used, and why

    def response(self, file: Path, ruined: bool) -> bytes:
        """Return the JPEG of an image, padded to `length`. Raises OSError or ValueError for one that was damaged."""
        prepared = self.images[file, ruined]
        data = prepared.file.read_bytes()
        if _digest(data) != prepared.digest:
            raise ValueError(f"{prepared.file} is damaged: start again, which makes it anew")
        return padded(data, self.length)


def prepare(
    files: Sequence[Path],
    home: Path,
    *,
    side: int | None = None,  # pixels of the longer side of the box; None: from the images, within the limits above
    ruined: Iterable[Path] = (),  # files of which a ruined copy is needed as well
    threads: int | None = None,
    show: bool = True,
) -> Gallery:
    """Encode `files` into the folder `home`, or find them there.

    A file that does not open is left out and listed in `broken`. Raises OSError if `home` cannot be written.
    """
    home.mkdir(parents=True, exist_ok=True)
    files = list(dict.fromkeys(files))
    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        shapes: dict[Path, tuple[int, int]] = {}
        sources, broken = {}, {}
        bar = _bar("reading", len(files), show)
        for file, read in zip(files, pool.map(_read, files), strict=True):
            bar.update()
            if isinstance(read, str):
                broken[file] = read
            else:
                sources[file], shapes[file] = read
        bar.close()
        size = _box(shapes.values(), side)
        kept = _kept(home, size)
        wanted = [(file, False) for file in sources] + [(file, True) for file in ruined if file in sources]
        bar = _bar("preparing", len(wanted), show)

        def make(one: tuple[Path, bool]) -> Prepared | str:
            file, is_ruined = one
            name = _name(sources[file].digest, is_ruined)
            length, digest = kept.get(name, (None, None))
            prepared = None if digest is None else _whole(home / name, length, digest)
            return prepared or _encoded(file, sources[file], home / name, size, is_ruined)

        images = {}
        for one, prepared in zip(wanted, pool.map(make, wanted), strict=True):
            bar.update()
            if isinstance(prepared, str):
                broken[one[0]] = prepared
            else:
                images[one] = prepared
        bar.close()
    for file in broken:
        sources.pop(file, None)
        images.pop((file, False), None)
    record = {prepared.file.name: [prepared.length, prepared.digest] for prepared in images.values()}
    write_signed_json(home / LISTING, {"format": FORMAT, "size": [*size], "images": {**kept, **record}}, indent=None)
    length = max((prepared.length for prepared in images.values()), default=0) + PADDING
    return Gallery(size, length, images, sources, broken)


def padded(jpeg: bytes, length: int) -> bytes:
    """Return a JPEG of exactly `length` bytes with the same pixels: comments of random bytes follow its first marker.

    `length` must exceed that of `jpeg` by 4 at least.
    """
    left = length - len(jpeg)
    assert left >= 4 and jpeg[:2] == b"\xff\xd8", (left, jpeg[:2])
    parts = [jpeg[:2]]
    while left:
        part = min(left - 4, COMMENT)
        if 0 < left - 4 - part < 4:  # the rest must hold a comment of its own
            part -= 4
        parts += [b"\xff\xfe", (part + 2).to_bytes(2, "big"), os.urandom(part)]
        left -= part + 4
    return b"".join([*parts, jpeg[2:]])


def ruined_copy(image: Image.Image, seed: str) -> Image.Image:
    """Return a copy in which nobody can prefer anything: its tiles have changed places, and all is blurred.

    Noise would ruin it as well, but would make it the longest of all files, to whose length all are padded.
    """
    draw = random.Random(seed)
    width, height = image.size
    across, down = min(TILES, width), min(TILES, height)
    boxes = [
        (width * i // across, height * j // down, width * (i + 1) // across, height * (j + 1) // down)
        for j in range(down)
        for i in range(across)
    ]
    tiles = [image.crop(box) for box in boxes]
    draw.shuffle(tiles)
    mixed = image.copy()
    for tile, box in zip(tiles, boxes, strict=True):
        mixed.paste(tile.resize((box[2] - box[0], box[3] - box[1])), box)
    small = (min(BLURRED, width), min(BLURRED, height))
    return mixed.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.BICUBIC)


def _box(shapes: Iterable[tuple[int, int]], side: int | None) -> Size:
    """The smallest box, with a longer side of `side`, into which images of these shapes (width, height) fit."""
    shapes = set(shapes) or {(1, 1)}
    longest = side or min(max(max(max(shape) for shape in shapes), SMALLEST), LARGEST)
    scaled = [_scaled(shape, Size(longest, longest)) for shape in shapes]
    return Size(max(width for width, _ in scaled), max(height for _, height in scaled))


def _scaled(shape: tuple[int, int], box: Size) -> Size:
    """A shape (width, height) as large as the box holds it."""
    width, height = shape
    if width * box.height >= height * box.width:
        return Size(box.width, max(1, round(height * box.width / width)))
    return Size(max(1, round(width * box.height / height)), box.height)


def _read(file: Path) -> tuple[ImageFile, tuple[int, int]] | str:
    """A file's size and digest, and its shape (width, height); or why it cannot be used."""
    try:
        data = read_bytes(file)
        header = read_header(data)
        width, height = header.width, header.height
        return ImageFile(len(data), _digest(data)), (height, width) if header.orientation >= 5 else (width, height)
    except (OSError, Refused, ValueError) as error:
        return _reason(error)


def _open(data: bytes) -> Image.Image:
    if png_is_whole(data) is False:
        raise BadImage("is damaged (its bytes do not agree with its checksum)")
    return decode(data)


def _encoded(file: Path, source: ImageFile, target: Path, size: Size, is_ruined: bool) -> Prepared | str:
    try:
        data = read_bytes(file)
        if _digest(data) != source.digest:
            return "has changed while it was read"
        image = _open(data)
    except (OSError, BadImage, BadInput) as error:
        return _reason(error)
    inner = _scaled(image.size, size)
    # The pixels of a tiny image stay visible as squares; blurred, it would look like a bad photograph.
    enlarge = Image.Resampling.NEAREST if inner.width > 2 * image.width else Image.Resampling.LANCZOS
    if image.size != inner:
        image = image.resize(inner, enlarge)
    if is_ruined:
        image = ruined_copy(image, source.digest)
    if inner != size:
        framed = Image.new("RGB", size, GREY)
        framed.paste(image, ((size.width - inner.width) // 2, (size.height - inner.height) // 2))
        image = framed
    encoded = io.BytesIO()
    Image.frombytes("RGB", image.size, image.tobytes()).save(encoded, "JPEG", quality=QUALITY, subsampling=0)
    jpeg = encoded.getvalue()
    with atomic_file(target) as temporary:
        temporary.write_bytes(jpeg)
    return Prepared(target, len(jpeg), _digest(jpeg))


def _kept(home: Path, size: Size) -> dict[str, tuple[int, str]]:
    """What the folder says that it holds, of this size: name -> length and digest."""
    try:
        listing = read_signed_json(home / LISTING, "", ["format", "size", "images"])
        if (listing["format"], listing["size"]) != (FORMAT, [*size]):
            return {}
        return {
            name: (length, digest)
            for name, (length, digest) in listing["images"].items()
            if is_inside(name) and isinstance(length, int) and isinstance(digest, str)
        }
    except (BadInput, TypeError, ValueError, AttributeError):  # missing or damaged: everything is made again
        return {}


def _whole(file: Path, length: int, digest: str) -> Prepared | None:
    try:
        data = read_bytes(file)
    except (OSError, BadInput):
        return None
    return Prepared(file, length, digest) if (len(data), _digest(data)) == (length, digest) else None


def _name(digest: str, is_ruined: bool) -> str:
    return f"{digest}{'-ruined' * is_ruined}.jpg"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _reason(error: Exception) -> str:
    return str(error.strerror or error) if isinstance(error, OSError) else str(error)


def _bar(title: str, total: int, show: bool) -> tqdm:
    return tqdm(desc=f"{title} images", total=total, unit=" images", disable=not show)
