"""Small preference sets of random images, in every layout that can be read."""

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encoded(random: np.random.Generator, size: int, kind: str = "JPEG") -> bytes:
    """A random image with some low-frequency content, as a file's bytes."""
    small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize((size, size), Image.Resampling.BICUBIC).save(out, kind)
    return out.getvalue()


def write_pickapic(
    path: Path,
    *,
    n: int = 12,
    size: int = 72,
    labels: list | None = None,  # None: 1 and 0 in turn
    captions: list | None = None,  # None: all different
    seed: int = 0,
) -> Path:
    """Pick-a-Pic's columns in one parquet file, images as bytes."""
    random = np.random.default_rng(seed)
    table = {
        "jpg_0": pa.array([encoded(random, size) for _ in range(n)], pa.binary()),
        "jpg_1": pa.array([encoded(random, size) for _ in range(n)], pa.binary()),
        "label_0": pa.array(labels or [float(i % 2 == 0) for i in range(n)], pa.float64()),
        "caption": pa.array(captions or [f"a picture of the number {i}" for i in range(n)], pa.string()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path)
    return path


if __name__ == "__main__":
    print(write_pickapic(Path(sys.argv[1])))
