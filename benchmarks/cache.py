"""The cache: how fast it is built and read on this machine, and what Pick-a-Pic would take.

    python benchmarks/cache.py [--pairs 2000] [--json FILE]

build: images and prompts a second of whole builds (JPEGs read, hashed, decoded, encoded, written) with small pipelines
of the real architectures and random weights, so what is measured is the machinery and not a real VAE.
read: pairs a second of training's own loader at the record sizes of the real models, in shuffled order from a warm page
cache, every record checked against its checksum; beside it a plain sequential read of as many bytes of the same files.
The last table multiplies record sizes by the counts of Pick-a-Pic v2. How many of its images are distinct is not known
here: the range is from an assumed 1.0 million to none recurring.
"""

import argparse
import contextlib
import io
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the small pipelines live with the tests

from dpo_fast import cache
from dpo_fast.caching.reader import CachedItems, CachedTransform
from dpo_fast.caching.recipe import caption_key
from dpo_fast.data import PairDataset, PairIndex, PairTransform, TrainStream, make_loader
from dpo_fast.data.batch import load_keys
from dpo_fast.data.images import Keys as ImageKeys
from dpo_fast.data.images import image_key
from dpo_fast.files import write_json
from dpo_fast.store import Field, Recipe, Store, Writer, begin_folder
from tests.helpers import pipelines
from tests.helpers.pairs import write_pickapic

PAIRS, PROMPTS = 851_293, 58_960  # Pick-a-Pic v2 without its ties
IMAGES = {"assumed": 1_000_000, "none recurs": 2 * PAIRS}
SOURCE_BYTES = 335e9
BATCH, ROUNDS = 8, 5


@dataclass(frozen=True)
class Shape:
    """The record layout of a real model."""

    name: str
    latents: tuple[Field, ...]
    text: tuple[Field, ...]

    @property
    def image_bytes(self) -> int:
        return sum(field.nbytes for field in self.latents)

    @property
    def prompt_bytes(self) -> int:
        return sum(field.nbytes for field in self.text)

    @property
    def pair_bytes(self) -> int:
        return 2 * self.image_bytes + self.prompt_bytes


def shape(name: str, side: int, width: int, pooled: int = 0) -> Shape:
    text = [Field("prompt_embeds", (77, width))]
    text += [Field("pooled_prompt_embeds", (pooled,))] if pooled else []
    return Shape(name, (Field("latents", (4, side, side)),), tuple(text))


SHAPES = [shape("SD1.5 512", 64, 768), shape("SDXL 512", 64, 2048, 1280), shape("SDXL 1024", 128, 2048, 1280)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2000, help="pairs in the cache that is read")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    where = f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, torch {torch.__version__}"
    print(f"{where}, python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder:
        built = build_rows(Path(folder))
        read = [read_row(shape, arguments.pairs, Path(folder)) for shape in SHAPES]
    hashing = hash_rate()
    predicted = [predict(shape, row, hashing) for shape, row in zip(SHAPES, read, strict=True)]
    if arguments.json:
        result = {"machine": where, "command": sys.argv, "build": built, "read": read, "pickapic": predicted}
        write_json(arguments.json, result)


def build_rows(folder: Path) -> list[dict]:
    """Time complete builds through the command, each run twice: the second finds everything cached."""
    print(f"\n{'build':34}{'images/s':>10}{'prompts/s':>11}{'again, s':>10}")
    rows = []
    for name, make, resolution in (("sd15", pipelines.make_sd15, 512), ("sdxl", pipelines.make_sdxl, 1024)):
        with contextlib.redirect_stderr(io.StringIO()):
            model = make(folder / name)
        counts = {"images": (24, ["one caption"] * 24), "prompts": (200, [f"caption {i}" for i in range(200)])}
        seconds = {}
        for what, (n, captions) in counts.items():
            side = resolution if what == "images" else 64
            data = write_pickapic(folder / f"{name}-{what}.parquet", n=n, size=side, captions=captions)
            flags = ["--pretrained_model_name_or_path", model, "--dataset_name", data, "--resolution", side]
            flags += ["--latent_cache_dir", folder / f"{name}-{what}"]
            seconds[what] = [seconds_of(["build", *map(str, flags)]) for _ in range(2)]
        images = 48 / (seconds["images"][0] - seconds["images"][1])
        prompts = 200 / (seconds["prompts"][0] - seconds["prompts"][1])
        row = {
            "case": f"small {name}, {resolution} px",
            "images_per_s": images,
            "prompts_per_s": prompts,
            "again_s": seconds["images"][1],
        }
        rows.append(row)
        print(f"{row['case']:34}{images:10.1f}{prompts:11.1f}{row['again_s']:10.1f}", flush=True)
    return rows


def seconds_of(argv: list[str]) -> float:
    """Run the cache command in this process; return the seconds it took."""
    started = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = cache.main(argv)
    assert status == 0, said.getvalue()
    return time.perf_counter() - started


class Keys:
    """A source whose images are all cached: it has keys instead of bytes."""

    def __init__(self, n: int):
        self._keys = [(image_key(b"%d w" % i), image_key(b"%d l" % i)) for i in range(n)]

    def image_keys(self, row: int) -> ImageKeys:
        return self._keys[row]


def read_row(shape: Shape, n: int, folder: Path) -> dict:
    """Measure the pairs per second of the training loader, against a plain read of as many bytes."""
    recipes = (Recipe("latents", {"of": shape.name}, shape.latents), Recipe("text", {"of": shape.name}, shape.text))
    source, prompts = Keys(n), [f"caption {i}" for i in range(max(1, n * PROMPTS // PAIRS))]
    images = [key for row in range(n) for key in source.image_keys(row)]
    random = np.random.default_rng(0)
    for recipe, keys in zip(recipes, (images, [caption_key(prompt) for prompt in prompts]), strict=True):
        begin_folder(folder, recipe)
        with Writer(folder, recipe, 0) as writer:
            for key in keys:
                writer.add(key, random.bytes(recipe.record_bytes), [512, 512, 0, 0])
    captions = [prompts[i % len(prompts)] for i in range(n)]
    ids = torch.arange(n)
    index = PairIndex(ids, torch.zeros(n, dtype=torch.int64), torch.ones(n), captions)
    transform = PairTransform(resolution=8 * shape.latents[0].shape[1], seed=0, timesteps=torch.arange(1000))
    cached = CachedTransform(transform, *(CachedItems(Store(folder, recipe)) for recipe in recipes))
    dataset = PairDataset(source, index, cached, load_keys)
    stream = TrainStream(seed=0, pair_ids=ids, pairs_per_step=BATCH, batch_size=BATCH)
    steps = n // BATCH

    def pass_over(first: int) -> float:
        started = time.perf_counter()
        for batch in make_loader(dataset, stream, first, first + steps, num_workers=1):
            assert batch.latents.dtype == torch.float16
        return steps * BATCH / (time.perf_counter() - started)

    files = [path for recipe in recipes for path in (folder / recipe.folder_name).glob("*.bin")]
    buffer = memoryview(bytearray(1 << 20))

    def plain() -> float:
        started, total = time.perf_counter(), 0
        wanted = steps * BATCH * shape.pair_bytes
        while total < wanted:
            for path in files:
                with path.open("rb", buffering=0) as file:
                    while total < wanted and (size := file.readinto(buffer)):
                        total += size
        return total / (time.perf_counter() - started)

    pass_over(0), plain()
    rounds = [(pass_over(steps * (i + 1)), plain()) for i in range(ROUNDS)]  # alternating: noise disturbs both
    pairs = sorted(r[0] for r in rounds)[ROUNDS // 2]
    bandwidth = sorted(r[1] for r in rounds)[ROUNDS // 2]
    row = {
        "case": shape.name,
        "bytes_an_image": shape.image_bytes,
        "bytes_a_prompt": shape.prompt_bytes,
        "bytes_a_pair": shape.pair_bytes,
        "pairs_per_s": pairs,
        "gb_per_s": pairs * shape.pair_bytes / 1e9,
        "plain_gb_per_s": bandwidth / 1e9,
        "of_plain": pairs * shape.pair_bytes / bandwidth,
    }
    if shape is SHAPES[0]:
        print(f"\n{'read, one process':34}{'KB/pair':>10}{'pairs/s':>11}{'GB/s':>8}{'plain read':>12}{'of plain':>10}")
    print(
        f"{shape.name:34}{shape.pair_bytes / 1e3:10.0f}{pairs:11.0f}{row['gb_per_s']:8.2f}{row['plain_gb_per_s']:12.2f}"
        f"{row['of_plain']:10.2f}",
        flush=True,
    )
    for path in files:
        path.unlink()
    return row


def hash_rate() -> float:
    """Measure the bytes per second of hashing images of 170 KB on one thread."""
    data = os.urandom(170_000)
    started = time.perf_counter()
    for _ in range(500):
        image_key(data)
    return 500 * len(data) / (time.perf_counter() - started)


def predict(shape: Shape, read: dict, hashing: float) -> dict:
    """Predict what Pick-a-Pic v2 takes at this model's record sizes; hashing: bytes per second."""
    text = PROMPTS * shape.prompt_bytes
    disk = {name: (images * shape.image_bytes + text) / 1e9 for name, images in IMAGES.items()}
    row = {
        "case": shape.name,
        "disk_gb": disk,
        "text_gb": text / 1e9,
        "epoch_read_s": PAIRS / read["pairs_per_s"],
        "hash_source_s": SOURCE_BYTES / hashing,
    }
    if shape is SHAPES[0]:
        title = f"Pick-a-Pic v2: {PAIRS:,} pairs"
        print(f"\n{title:34}{'disk, GB':>14}{'of it text':>12}{'an epoch read':>15}{'335 GB hashed':>15}")
    low, high = disk.values()
    epoch, hashed = row["epoch_read_s"] / 60, row["hash_source_s"] / 60
    print(f"{shape.name:34}{f'{low:.0f} .. {high:.0f}':>14}{text / 1e9:12.1f}{epoch:11.1f} min{hashed:11.1f} min")
    return row


if __name__ == "__main__":
    main()
