"""Checksums of everything that is written now and read back later, so that bytes that changed on disk are noticed.

    a JSON file     `write_signed_json`, `read_signed_json`: its digest is the object's last member
    a text file     `signed_text`, `check_text`: its digest is a comment in the first line
    a PNG           `signed_png`, `png_is_whole`: its digest is in the last text chunk
    any other file  `file_digest`, kept in a signed JSON file beside it

They detect bit rot, truncation and mix-ups, not forgery: anyone who can change a file can sign it again.
"""

import hashlib
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import xxhash

from dpo_fast.errors import BadInput
from dpo_fast.files import naming, parse_json, read_bytes, regular_file, write_text

logger = logging.getLogger(__name__)

_COMPACT = ',"digest":"', '"}\n', "}"  # before the digest, after it, and the end of the unsigned object
_INDENTED = ',\n  "digest": "', '"\n}\n', "\n}"
# The end of a signed object, even if one character of the name or of the digest has changed.
_SIGNED = re.compile(r'("digest"\s*:\s*"[^"\n]{0,20}"|"[^"\n]{6}"\s*:\s*"[0-9a-f]{16}")\s*\}\s*$')
_COMMENT = "# checksum of the lines below: "
_END = b"\0\0\0\0IEND\xaeB`\x82"  # the end of every PNG
_TEXT = b"tEXtchecksum\0"
_BLOCK = 4 << 20  # bytes of a file read at once


class Damaged(BadInput):
    """A file is not what was written. The message names the file and the remedy."""


def digest(data: bytes) -> str:
    """Return the 64-bit BLAKE2b digest of `data` in hexadecimal."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def file_digest(path: Path) -> str:
    """Return a file's 128-bit XXH3 in hexadecimal: as fast as memory; for 10 GB SHA-256 takes 6 s, BLAKE2b 16 s.

    Raises OSError, and BadInput for anything but a regular file.
    """
    return _of_file(path, xxhash.xxh3_128)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, as `sha256sum` prints it. Raises like `file_digest`."""
    return _of_file(path, hashlib.sha256)


def _of_file(path: Path, algorithm: Callable[[], Any]) -> str:
    whole = algorithm()
    with naming(Path(path)), regular_file(Path(path)).open("rb") as file:
        while block := file.read(_BLOCK):
            whole.update(block)
    return whole.hexdigest()


# ---- JSON --------------------------------------------------------------------------------------------------------


def signed(text: str) -> str:
    """Return the text of a non-empty JSON object with its digest added as the last member."""
    mark, end, closing = _INDENTED if text.endswith("\n}") else _COMPACT
    return f"{text.removesuffix(closing)}{mark}{digest(text.encode())}{end}"


def unsigned(text: str) -> str:
    """Return the text that `signed` was given. Raises ValueError if it has changed."""
    for mark, end, closing in (_COMPACT, _INDENTED):
        body, _, rest = text.rpartition(mark)
        body += closing
        if rest == digest(body.encode()) + end:
            return body
    raise ValueError("its contents do not agree with their digest")


def parse_signed(data: bytes, *, required: bool = True) -> Any:
    """Parse a signed JSON object. Unless `required`, one without a digest, of an earlier version, is accepted.

    Raises ValueError for one that has changed, is not JSON, or holds NaN or infinity.
    """
    text = data.decode()
    if required or _SIGNED.search(text):
        text = unsigned(text)
    return parse_json(text, parse_constant=_no_number)


def write_signed_json(path: Path, value: dict[str, Any], *, indent: int | None = 2) -> None:
    """Write a JSON object with its digest as the last member, `digest`, atomically.

    Raises OSError, and ValueError for NaN and infinity, which are not JSON.
    """
    separators = (",", ":") if indent is None else None
    write_text(path, signed(json.dumps(value, indent=indent, separators=separators, allow_nan=False)))


def read_signed_json(path: Path, remedy: str, names: Iterable[str] = ()) -> dict[str, Any]:
    """Read the object in a file of `write_signed_json`, or in one without a digest, as earlier versions wrote them.

    Raises Damaged, with `remedy`, for a file that cannot be read, has changed, or is missing one of `names`.
    """
    try:
        value = parse_signed(read_bytes(path), required=False)
        if not isinstance(value, dict) or not value.keys() >= set(names):
            raise ValueError(f"it lacks some of {', '.join(names)}" if names else "it is no object")
        return value
    except OSError as error:
        reason = error.strerror or error
    except ValueError as error:
        reason = error
    raise Damaged(f"{path} cannot be read or is damaged ({reason}): {remedy}")


def _no_number(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no JSON")


# ---- texts -------------------------------------------------------------------------------------------------------


def signed_text(text: str) -> str:
    """Return text in a language whose comments begin with #, preceded by a comment with its digest."""
    return f"{_COMMENT}{digest(text.encode())}\n{text}"


def check_text(path: Path, remedy: str) -> None:
    """Raise Damaged, with `remedy`, if a file of `signed_text` has changed, is empty, or cannot be read.

    A file without that comment is accepted: it was written by hand.
    """
    try:
        text = read_bytes(path).decode()
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror or error}): {remedy}") from error
    except ValueError as error:
        raise Damaged(f"{path} is damaged ({error}): {remedy}") from error
    first, _, body = text.partition("\n")
    if not text or (first.startswith(_COMMENT[:8]) and first != f"{_COMMENT}{digest(body.encode())}"):
        raise Damaged(
            f"{path} has changed since it was written (its contents do not agree with their digest): {remedy}"
        )


# ---- pictures ----------------------------------------------------------------------------------------------------


def signed_png(data: bytes) -> bytes:
    """Return a PNG file's bytes with their digest in a last text chunk, `checksum`, which PNG readers ignore."""
    assert data.endswith(_END)
    return data[: -len(_END)] + _checksum_chunk(data) + _END


def png_is_whole(data: bytes) -> bool | None:
    """Whether a PNG is as `signed_png` made it; None if it has no checksum."""
    length = len(_checksum_chunk(b"")) + len(_END)
    chunk = data[-length : -len(_END)]
    if chunk[4 : 4 + len(_TEXT)] != _TEXT:
        return None
    body = data[:-length] + _END
    return data == body[: -len(_END)] + _checksum_chunk(body) + _END


def _checksum_chunk(data: bytes) -> bytes:
    """The PNG chunk that holds the digest of `data`."""
    body = _TEXT + xxhash.xxh3_128_hexdigest(data).encode()
    length, crc = len(body) - 4, zlib.crc32(body)  # the CRC covers the chunk's name, too
    return length.to_bytes(4, "big") + body + crc.to_bytes(4, "big")
