"""What is known about the rows of a source, so that its images need not be read again.

    pairs-<hash>/manifest.json            the source's description, identity and columns; whether a stream was read to
                                          its end; the name of the rows file
                 rows-<digest>.parquet    one line per known row: its images' keys, or what is wrong with them; for a
                                          stream also its caption and label
                 part-N-<digest>.parquet  the same, written while a build is running; merged into one file at its end

<digest> hashes the file's bytes. <hash> covers how the source was requested, its files' names, sizes and modification
times, and for a stream STREAM_FORMAT. A data set that was copied or touched is read and hashed again, but nothing is
encoded again, because an entry's key depends only on the image.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_fast.checksums import digest, parse_signed, write_signed_json
from dpo_fast.data.columns import Columns
from dpo_fast.data.images import SAME, BadImage, Encoded, ImageKey, Keys, decode, image_key
from dpo_fast.data.sources import BadRow, Identity, Source, StreamedRow, StreamedSource
from dpo_fast.errors import BadInput, disk_error
from dpo_fast.files import atomic_file, has_temporaries, is_inside, parse_json, read_bytes, remove_temporaries
from dpo_fast.store import KEY_BYTES

STREAM_FORMAT = 2  # version of the labels in a stream's manifest: raise it when `Columns.label_of` changes

_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("key_0", pa.binary(KEY_BYTES)),
        ("key_1", pa.binary(KEY_BYTES)),
        ("fault_0", pa.string()),  # why there are no bytes to hash, as JSON of [column, reason]
        ("fault_1", pa.string()),
        ("decoded", pa.bool_()),  # null: not tried
        ("bad_column", pa.string()),  # of the first image that did not decode
        ("bad_reason", pa.string()),
        ("caption", pa.string()),  # JSON; null unless the source is a stream
        ("label", pa.string()),
    ]
)


class Manifest:
    """What is known about one source's rows. An image is given as its key, or as the BadImage that says why not."""

    def __init__(self, folder: Path):
        """Load `folder`, which need not exist. Raises BadInput for damaged files; disk errors pass through."""
        self.folder = folder
        self.reload()

    def reload(self) -> None:
        """Replace what is held in memory by what is on disk. Raises as `__init__` does."""
        folder = self.folder
        self.about: dict[str, Any] | None = None  # description, identity, columns, ended, rows (file); None: new
        self._rows: dict[int, dict[str, Any]] = {}  # as in the file, nulls left out
        self._new: list[int] = []  # not yet in any file
        try:
            if (folder / "manifest.json").exists():
                self.about = _checked(parse_signed(read_bytes(folder / "manifest.json")))
            parts = sorted(folder.glob("part-*.parquet"))
            whole = sorted(folder.glob("rows-*.parquet"), key=lambda file: file.stat().st_mtime_ns)
            if self.about is not None and (kept := self.about.get("rows")) and not (folder / kept).is_file():
                raise ValueError(f"{kept} is not there")
            for file in [*whole, *parts]:  # the latest entry of a row wins
                self._read(file)
        except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
            if disk_error(error) is not None:
                raise  # a disk error is no reason to delete the folder
            raise BadInput(f"{folder} cannot be read ({error}): delete the folder, it is made again") from error
        self._parts, self._merged = len(parts), len(whole)
        self._files = _listing(folder)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, row: int) -> bool:
        """Whether the row's images are known."""
        return row in self._rows

    @property
    def changed(self) -> bool:
        """Whether there are entries that are not yet in any file."""
        return bool(self._new)

    @property
    def untidy(self) -> bool:
        """Whether a killed process left unmerged parts, an older rows file, or temporary files."""
        return self._parts > 0 or self._merged > 1 or has_temporaries(self.folder)

    def images(self, row: int) -> Keys:
        """The keys of a row's images, or why there are none. Raises KeyError for an unknown row."""
        facts = self._rows[row]
        first, second = (facts.get(f"key_{side}") or _fault(facts[f"fault_{side}"]) for side in (0, 1))
        return first, second

    def decodes(self, row: int) -> bool | BadRow:
        """Whether both images of a row decode; a BadRow says why not. Raises KeyError if that was never tried."""
        if self._rows[row]["decoded"]:
            return True
        return self.bad(row)

    def bad(self, row: int) -> BadRow | None:
        """Why an image of a known row does not decode; None if both decode or that was never tried."""
        facts = self._rows[row]
        return BadRow(row, facts["bad_column"], facts["bad_reason"]) if facts.get("decoded") is False else None

    def note(self, row: int, images: Keys, text: tuple | None = None) -> None:
        """Remember a row's keys (or why there are none), and for a stream also its (caption, label) as stored."""
        self._rows[row] = _facts(images, text)
        self._new.append(row)

    def agrees(self, row: int, images: Keys, text: tuple | None = None) -> bool:
        """Whether a known row still matches what was noted."""
        return all(self._rows[row].get(name) == value for name, value in _facts(images, text).items())

    def note_decoded(self, row: int, bad: BadRow | None) -> None:
        """Remember whether both images of a known row decode."""
        facts = self._rows[row]
        before = dict(facts)
        facts["decoded"] = bad is None
        if bad is not None:
            facts["bad_column"], facts["bad_reason"] = bad.column, bad.reason
        if facts != before:
            self._new.append(row)

    @property
    def columns(self) -> Columns:
        """The source's columns; available once `about` is set."""
        return _columns(self.about["columns"])

    def streamed_rows(self) -> Iterator[StreamedRow]:
        """Yield the known rows of a stream, with keys instead of image bytes."""
        yield from map(self.streamed_row, range(len(self._rows)))

    def streamed_row(self, row: int) -> StreamedRow:
        """A known row of a stream, with keys instead of image bytes."""
        facts = self._rows[row]
        return StreamedRow(row, parse_json(facts["caption"]), parse_json(facts["label"]), self.images(row))

    def stream(self) -> StreamedSource:
        """The stream as far as it is known, with keys instead of image bytes.

        Reading past the last known row raises RuntimeError unless the stream was read to its end.
        """

        def rows() -> Iterator[StreamedRow]:
            yield from self.streamed_rows()
            if not self.about["ended"]:
                raise RuntimeError(f"{self.folder} holds the first {len(self._rows)} rows only")

        return StreamedSource(self.about["description"], Identity(self.about["identity"], ""), self.columns, rows)

    def begin(self, source: Source | StreamedSource) -> None:
        """Clear temporary files, and write manifest.json if it is missing, before the first part.

        Rows that another process has saved since this manifest was loaded are merged in.
        """
        remove_temporaries(self.folder)
        if _listing(self.folder) != self._files:
            new = {row: self._rows[row] for row in self._new}
            self.reload()
            self._rows |= new
            self._new = list(new)
        if self.about is None:
            about = {
                "description": source.description,
                "identity": source.identity.rows.removesuffix(" streamed"),
                "columns": asdict(source.columns),
                "ended": False,
            }
            self._write_about(about)

    def save_part(self) -> None:
        """Write the new entries as a part, so that a killed process need not read those rows again."""
        if self._new:
            self._write(f"part-{self._parts:05d}", sorted(set(self._new)))
            self._parts, self._new = self._parts + 1, []

    def save(self, ended: bool) -> None:
        """Write all known rows as one file, which is the same however often the work was interrupted."""
        written = self._write("rows", sorted(self._rows))
        self._write_about({**self.about, "ended": ended or self.about["ended"], "rows": written.name})
        for file in [*self.folder.glob("rows-*.parquet"), *self.folder.glob("part-*.parquet")]:
            if file != written:
                file.unlink()
        self._parts, self._merged, self._new = 0, 1, []

    def touch(self) -> None:
        """Update the time of last use, for `prune`; a read-only cache is left as it is."""
        with suppress(OSError):
            os.utime(self.folder / "manifest.json")

    def _read(self, file: Path) -> None:
        data = read_bytes(file)
        if not file.stem.endswith(f"-{digest(data)}"):
            raise ValueError(f"the contents of {file.name} do not agree with the digest in its name")
        for batch in pq.ParquetFile(pa.BufferReader(data)).iter_batches(columns=_SCHEMA.names):
            for facts in batch.to_pylist():
                self._rows[facts["row"]] = {k: v for k, v in facts.items() if v is not None and k != "row"}

    def _write(self, name: str, rows: list[int]) -> Path:
        table = pa.Table.from_pylist([{"row": row, **self._rows[row]} for row in rows], schema=_SCHEMA)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        data = sink.getvalue().to_pybytes()
        path = self.folder / f"{name}-{digest(data)}.parquet"
        with atomic_file(path) as temporary:
            temporary.write_bytes(data)
        return path

    def _write_about(self, about: dict[str, Any]) -> None:
        self.about = about
        write_signed_json(self.folder / "manifest.json", about, indent=None)


def _columns(named: dict[str, Any]) -> Columns:
    return Columns(**{name: tuple(value) if isinstance(value, list) else value for name, value in named.items()})


def _checked(about: Any) -> dict[str, Any]:
    """Validate the contents of manifest.json and return them unchanged. Raises ValueError for anything else."""
    try:
        texts, columns, rows = (
            (about["description"], about["identity"]),
            _columns(about["columns"]),
            about.get("rows", ""),
        )
        named = [*columns.images, *columns.of_label, columns.caption, *(columns.names or ())]
        if not all(isinstance(text, str) for text in (*texts, *named, rows)) or len(columns.images) != 2:
            raise ValueError("texts are missing")
        if not isinstance(about["ended"], bool) or (rows and (not is_inside(rows) or "/" in rows)):
            raise ValueError("it names no file of this folder")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"manifest.json is not what was written: {error}") from error
    return about


def _listing(folder: Path) -> list[str]:
    """The names of the parquet files in a manifest's folder, which carry digests of their contents."""
    return sorted(path.name for path in folder.glob("*.parquet"))


class RememberedSource:
    """A random-access source that consults the manifest before it reads an image, and notes there what it read."""

    def __init__(self, source: Source, manifest: Manifest):
        self._source, self.manifest = source, manifest
        self.description, self.columns = source.description, source.columns

    def __len__(self) -> int:
        return len(self._source)

    def captions(self) -> list[Any]:
        return self._source.captions()

    def labels(self) -> list[Any]:
        return self._source.labels()

    def image_names(self) -> list[tuple[str, str] | None] | None:
        return self._source.image_names()

    def missing_images(self, progress: bool = False) -> list[BadRow]:
        return self._source.missing_images(progress)

    @property
    def identity(self) -> Identity:
        return self._source.identity

    def image_bytes(self, row: int) -> tuple[bytes, bytes]:
        return self._source.image_bytes(row)

    def check_images(self, row: int) -> None:
        """Raise BadImage where an image of the row does not decode, or is the same as the other one."""
        try:
            verdict = self.manifest.decodes(row)
        except KeyError:
            verdict = self._decode(row)
        if isinstance(verdict, BadRow):
            raise BadImage(verdict.reason, verdict.column)
        first, second = self.manifest.images(row)
        if first == second:
            raise BadImage(SAME, self.columns.images[1])

    def image_keys(self, row: int) -> tuple[ImageKey, ImageKey]:
        """The keys of both images. Raises BadImage if one cannot be read."""
        if row not in self.manifest:
            self.manifest.note(row, read_images(self._source, row)[0])
        for image in (images := self.manifest.images(row)):
            if isinstance(image, BadImage):
                raise image
        return images

    def _decode(self, row: int) -> bool | BadRow:
        keys, images = read_images(self._source, row)
        if row not in self.manifest:
            self.manifest.note(row, keys)
        self.manifest.note_decoded(row, undecodable(row, images, self.columns))
        return self.manifest.decodes(row)


def read_images(source: Source, row: int) -> tuple[Keys, Encoded]:
    """Read a row's images: their keys and their bytes, or the BadImage in place of each if they cannot be read."""
    try:
        images = source.image_bytes(row)
    except BadImage as error:
        images = (error, error)
    return keys_of(images), images


def keys_of(images: Encoded) -> Keys:
    first, second = (image if isinstance(image, BadImage) else image_key(image) for image in images)
    return first, second


def undecodable(row: int, images: Encoded, columns: Columns) -> BadRow | None:
    """Return the first of a row's images that does not decode, in column order, or None."""
    for column, image in zip(columns.images, images, strict=True):
        try:
            if isinstance(image, BadImage):
                raise image
            decode(image)
        except BadImage as error:
            return BadRow(row, error.column or column, error.reason)
    return None


def _facts(images: Keys, text: tuple | None) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for side, image in enumerate(images):
        if isinstance(image, BadImage):
            facts[f"fault_{side}"] = json.dumps([image.column, image.reason])
        else:
            facts[f"key_{side}"] = image
    if text is not None:
        facts["caption"], facts["label"] = (json.dumps(value, default=_as_no_text) for value in text)
    return facts


def _fault(text: str) -> BadImage:
    column, reason = parse_json(text)
    return BadImage(reason, column)


def _as_no_text(value: Any) -> dict[str, str]:
    """A JSON stand-in for a value that JSON cannot hold; no check takes it for text."""
    return {"not JSON": repr(value)}
