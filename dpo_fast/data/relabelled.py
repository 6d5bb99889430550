"""Check a parquet file of `python -m dpo_fast.relabel` against its checksums, before training on it."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_fast.checksums import Damaged
from dpo_fast.errors import disk_error
from dpo_fast.files import regular_file

IMAGES = ("jpg_0", "jpg_1")
DIGEST = b"dpo_fast.relabel.digest"  # the key of the digest of captions, labels and scores in the file's metadata
_ROWS = 8192  # read at once
_AGAIN = "the command that made it, with --overwrite, writes it again from the scores that it kept"


class LabelDigest:
    """A digest of captions, labels and scores, independent of row groups."""

    def __init__(self) -> None:
        self._whole = hashlib.blake2b(digest_size=16)

    def update(self, row: Sequence[object]) -> None:
        """Add the values of a row's columns, except the images."""
        plain = [float(value) if isinstance(value, float) else value for value in row]  # NumPy's repr names the type
        self._whole.update(repr(plain).encode(errors="replace"))

    def hexdigest(self) -> str:
        return self._whole.hexdigest()


def check_labels(path: Path) -> None:
    """Raise Damaged if the captions, labels or scores of a relabelled file have changed since they were written.

    The images, which are most of the file, are not read. Any other parquet file passes if its metadata can be read.
    """
    regular_file(path)
    try:
        # absolute: pyarrow takes a relative name with a colon for a URI
        expected = (pq.read_metadata(os.path.abspath(path)).metadata or {}).get(DIGEST)
    except (OSError, ValueError, pa.ArrowException) as error:
        if disk_error(error) is not None:
            raise
        reason = " ".join(str(error).split())
        raise Damaged(f"{path} cannot be read as a parquet file ({reason}): copy it again") from error
    if expected is None:
        return
    try:
        with pq.ParquetFile(os.path.abspath(path), page_checksum_verification=True) as file:
            columns = [name for name in file.schema_arrow.names if name not in IMAGES]
            found = LabelDigest()
            for batch in file.iter_batches(_ROWS, columns=columns):
                for row in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                    found.update(row)
        reason = None if found.hexdigest().encode() == expected else "they do not agree with their digest"
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
    if reason is not None:
        raise Damaged(f"{path}: its captions, labels or scores are damaged ({reason}): {_AGAIN}")


def check_all(path: Path) -> None:
    """Raise Damaged like `check_labels`, and also if any page of the file is damaged, images included."""
    check_labels(path)
    try:
        with pq.ParquetFile(os.path.abspath(path), page_checksum_verification=True) as file:
            for _ in file.iter_batches(64):
                pass
    except (OSError, ValueError, pa.ArrowException) as error:
        raise Damaged(f"{path} is damaged ({' '.join(str(error).split())}): {_AGAIN}") from error
