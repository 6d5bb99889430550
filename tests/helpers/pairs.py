"""Small preference sets of random images, in every layout that can be read."""

import io
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dpo_fast.data import PairsSource, Source, StreamedSource, open_source


def encoded(random: np.random.Generator, size: int | tuple[int, int], kind: str = "JPEG") -> bytes:
    """A random image (of a side, or width and height) with some low-frequency content, as a file's bytes."""
    small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    wide = (size, size) if isinstance(size, int) else size
    return as_file(small.resize(wide, Image.Resampling.BICUBIC), kind)


def as_file(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """An image as a file's bytes."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pickapic(
    *,
    n: int = 12,
    size: int | tuple[int, int] = 72,
    labels: list | None = None,  # None: 1 and 0 in turn
    captions: list | None = None,  # None: all different
    seed: int = 0,
    kind: str = "JPEG",
) -> dict[str, list]:
    """Pick-a-Pic's columns, images as bytes."""
    random = np.random.default_rng(seed)
    return {
        "jpg_0": [encoded(random, size, kind) for _ in range(n)],
        "jpg_1": [encoded(random, size, kind) for _ in range(n)],
        "label_0": [float(i % 2 == 0) for i in range(n)] if labels is None else labels,
        "caption": [f"a picture of the number {i}" for i in range(n)] if captions is None else captions,
    }


def write_table(path: Path, columns: dict[str, list]) -> Path:
    """Columns to one parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def write_pickapic(path: Path, **options) -> Path:
    """Pick-a-Pic's columns in one parquet file, images as bytes; options as `pickapic`'s."""
    return write_table(path, pickapic(**options))


def write_arrow_file(path: Path, columns: dict[str, list]) -> Path:
    """Columns to one Arrow file, as `datasets` streams them to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def as_image_feature(columns: dict[str, list]) -> datasets.Dataset:
    """A data set whose image columns have the Image feature, that is structs of bytes and path."""
    images = [name for name in columns if name in ("jpg_0", "jpg_1", "chosen", "rejected")]
    table = datasets.Dataset.from_dict(
        {name: [{"bytes": v, "path": None} for v in c] if name in images else c for name, c in columns.items()}
    )
    for name in images:
        table = table.cast_column(name, datasets.Image())
    return table


def preference(columns: dict[str, list]) -> dict[str, list]:
    """Pick-a-Pic's columns as prompt, chosen, rejected; labels must be 0 or 1."""
    rows = list(zip(columns["jpg_0"], columns["jpg_1"], columns["label_0"], columns["caption"], strict=True))
    return {
        "prompt": [caption for *_, caption in rows],
        "chosen": [first if label == 1 else second for first, second, label, _ in rows],
        "rejected": [second if label == 1 else first for first, second, label, _ in rows],
    }


def write_jsonl(folder: Path, columns: dict[str, list], name: str = "train.jsonl") -> Path:
    """A folder with image files and JSONL of prompt, chosen, rejected."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    table = preference(columns)
    for row, prompt in enumerate(table["prompt"]):
        for side in ("chosen", "rejected"):
            (folder / "images" / f"{row}-{side}.jpg").write_bytes(table[side][row])
        paths = {side: f"images/{row}-{side}.jpg" for side in ("chosen", "rejected")}
        lines.append(json.dumps({"prompt": prompt, **paths}))
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def open_pairs(name: str | Path, **fields) -> Source | StreamedSource:
    """`open_source` of the pairs at `name`; fields: further ones of PairsSource."""
    return open_source(PairsSource(name, **fields))


if __name__ == "__main__":
    print(write_pickapic(Path(sys.argv[1])))
