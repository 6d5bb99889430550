"""Prompts to images on disk for one model or several, from the same initial noise.

    OUT/<model>/<prompt>-<seed>.png    with prompt, seed, model, steps, guidance, sampler, checksum ... as PNG texts
    OUT/images.json                    the settings, and a row an image; its digest
    OUT/grid.png                       a column a prompt, a row a model

Images are made in batches that prompts and seeds alone decide, so that what is made again after an interruption, and
what other ranks make, is the same to the bit.
"""

import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from tqdm.auto import tqdm

from dpo_fast import __version__, output_folder
from dpo_fast.checksums import png_is_whole, write_signed_json
from dpo_fast.data.image_files import THREADS
from dpo_fast.data.images import BadImage, crop_corner, decode, scaled, texts_of, to_pixels
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.generate_options import STRENGTH, GenerateConfig
from dpo_fast.evaluation.image_names import IMAGE_FILES, file_stem, image_files, images_of
from dpo_fast.evaluation.prompts import Prompt
from dpo_fast.files import read_bytes, remove_temporaries, user_path
from dpo_fast.models import Family
from dpo_fast.models.fingerprints import weights_digest
from dpo_fast.models.opened import OneAtATime, compute_dtype, files_stamp
from dpo_fast.models.sampling import sample
from dpo_fast.models.source import ModelSource
from dpo_fast.parallel import Ranks
from dpo_fast.pictures import picture_grid, save_png, to_picture

logger = logging.getLogger(__name__)

LISTING, GRID = "images.json", "grid.png"
PACKAGES = ("torch", "diffusers")  # whose versions an image notes
COLUMNS, LARGEST_CELL = 8, 384  # of grid.png; a cell in pixels


@dataclass(frozen=True)
class Layout:
    """An image to start from."""

    path: Path
    digest: str  # of the file

    def pixels(self, resolution: int) -> torch.Tensor:
        """uint8 [3, resolution, resolution]: the shorter side scaled to the resolution, then the centre."""
        image, _ = scaled(read_bytes(self.path), resolution)
        return to_pixels(image, *crop_corner(image.size, resolution, None), resolution)


@dataclass(frozen=True)
class ImageRequest:
    """What to generate: every prompt with every seed from every model.

    Raises BadInput where the strength leaves a model no step.
    """

    models: Mapping[str, ModelSource]  # name of its folder -> model, settled
    prompts: Sequence[Prompt]
    seeds: Sequence[int]
    layouts: Mapping[str, Layout] | None = None  # prompt -> where to start from; None: from noise
    strength: float | None = None  # with layouts: of the noise, in (0, 1]
    batch_size: int = 8  # images generated at once by a rank

    def __post_init__(self) -> None:
        for name, model in self.models.items() if self.strength is not None else ():
            if int(model.steps * self.strength) < 1:
                raise BadInput(
                    f"--strength ({self.strength}) of {model.steps} steps ({name}) is less than one step: raise it, or"
                    " --sampling_steps"
                )

    def rows(self) -> list["ImageRow"]:
        """A row an image, in the order of models, prompts and seeds. A prompt that recurs names its image again."""
        return [
            ImageRow(
                name,
                *prompt,
                seed,
                noise_seed(prompt.text, seed),
                self.layouts[prompt.text].path.name if self.layouts else None,
                f"{name}/{file_stem(prompt.text)}-{seed}.png",
            )
            for name in self.models
            for prompt in self.prompts
            for seed in self.seeds
        ]


def wanted_of(
    config: GenerateConfig, models: Mapping[str, ModelSource], prompts: Sequence[Prompt], seeds: Sequence[int]
) -> ImageRequest:
    """What the flags of generation ask of some models. Raises BadInput for layouts that are not there."""
    of_layouts = config.layout is not None
    return ImageRequest(
        models,
        prompts,
        seeds,
        layouts=read_layouts(user_path(config.layout), prompts) if of_layouts else None,
        strength=(config.strength or STRENGTH) if of_layouts else None,
        batch_size=config.batch_size,
    )


class ImageRow(NamedTuple):
    """One image of one prompt."""

    model: str
    prompt: str
    source: str  # the prompt's set or file
    category: str | None
    challenge: str | None
    seed: int
    noise_seed: int  # torch.Generator("cpu").manual_seed(noise_seed) draws the initial noise
    layout: str | None  # file name
    file: str  # relative to the folder of images.json


def generate_images(wanted: ImageRequest, out: Path, ranks: Ranks) -> int:
    """Make what is missing of `wanted` in `out`, every rank its share; how many images that were, on every rank.

    Raises BadInput, on every rank, where `out` holds something else, or images of other settings or weights.
    """
    with ExitStack() as held:
        ranks.on_main(lambda: held.enter_context(output_folder.hold(out)))
        return _generate_missing(wanted, out, ranks)


def _generate_missing(wanted: ImageRequest, out: Path, ranks: Ranks) -> int:
    """`generate_images` in a folder that is held."""
    rows = wanted.rows()
    ranks.on_main(lambda: _claim(wanted, rows, out, ranks.device))
    missing = set(ranks.from_main(lambda: _missing(wanted, rows, out)))
    unchanged = ranks.from_main(lambda: _unchanged(wanted, out))
    models = OneAtATime(ranks.device)
    for name in wanted.models:
        if name in unchanged and not any(row.file in missing for row in rows if row.model == name):
            continue  # otherwise it is opened, if only to see that its images are still those of its weights
        mine = _batches([row for row in rows if row.model == name], wanted.batch_size)[ranks.rank :: ranks.world_size]
        share = _Share(wanted, name, [b for b in mine if any(row.file in missing for row in b)], missing, out)
        ranks.on_all(lambda share=share: share.open(models))
        ranks.on_main(lambda share=share: _same_weights(out, share.about, share.source))
        ranks.on_all(lambda share=share: share.make(models, show=ranks.is_main))
    ranks.on_main(lambda: _finish(wanted, rows, out))
    return len(missing)


def is_complete(out: Path) -> bool:
    """Whether all images that were wanted last in `out` are there."""
    listing = _listing(out)
    return listing is not None and listing["complete"]


def read_layouts(path: Path, prompts: Sequence[Prompt]) -> dict[str, Layout]:
    """The layout of every prompt: the image at `path`, or one of the folder `path`.

    Of a folder a prompt takes the image that is named like it (`images_of`); the k-th prompt without one takes the k-th
    of all in the order of their names, starting again at the end. Raises BadInput for what is not there, and for an
    image that does not open.
    """
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))
    chosen: dict[str, Path] = {}
    if path.is_dir():
        files = image_files(path)
        if not files:
            raise BadInput(f"--layout {path} holds no image ({', '.join(IMAGE_FILES)}); name an image or their folder")
        chosen = {text: images[0].file for text, images in images_of(path, texts).images.items()}
    elif path.is_file():
        files = [path]
    else:
        raise BadInput(f"--layout {path} does not exist; name an image or a folder of images")
    unnamed = [text for text in texts if text not in chosen]
    chosen |= {text: files[k % len(files)] for k, text in enumerate(unnamed)}
    opened = {file: _open_layout(file) for file in set(chosen.values())}
    return {text: opened[chosen[text]] for text in texts}


def versions() -> str:
    """The versions of the packages that an image depends on."""
    return ", ".join([f"dpo_fast {__version__}", *(f"{name} {version(name)}" for name in PACKAGES)])


def noise_seed(prompt: str, seed: int) -> int:
    """The generator's seed for an image's initial noise, in [0, 2^63): the same for every model.

    Other prompts start from other noise, so that they tell of the models independently of each other.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}\n{prompt}".encode(), digest_size=8).digest(), "little") >> 1


def _open_layout(path: Path) -> Layout:
    try:
        data = read_bytes(path)
        decode(data)
    except (OSError, BadImage) as error:
        raise BadInput(f"--layout {path} {error}; name an image that opens") from error
    return Layout(path, hashlib.blake2b(data, digest_size=8).hexdigest())


def _each(rows: Sequence[ImageRow]) -> list[ImageRow]:
    """One row a file."""
    return list({row.file: row for row in reversed(rows)}.values())[::-1]


def _batches(rows: Sequence[ImageRow], size: int) -> list[list[ImageRow]]:
    """One row a file, `size` at a time."""
    each = _each(rows)
    return [each[first : first + size] for first in range(0, len(each), size)]


class _Share:
    """The images of one model that this rank makes."""

    def __init__(
        self, wanted: ImageRequest, name: str, batches: Sequence[Sequence[ImageRow]], missing: set[str], out: Path
    ) -> None:
        self.wanted, self.name, self.source = wanted, name, wanted.models[name]
        self.batches, self.missing, self.out = batches, missing, out
        self.about: dict[str, str] = {}  # the texts that all images of the model have

    def open(self, models: OneAtATime) -> None:
        """Load the model."""
        family, source = models.open(self.source), self.source
        self.about = {
            "model": self.name,
            "weights": source.shown(),
            "digest": _digest({part: weights_digest(module) for part, module in _modules(family)}),
            "family": family.name,
            "sampler": type(family.pipeline.scheduler).__name__,
            "steps": str(source.steps),
            "guidance": f"{source.guidance:g}",
            "resolution": str(source.resolution),
            "dtype": str(family.dtype).removeprefix("torch."),
            "versions": versions(),
        }

    def make(self, models: OneAtATime, show: bool) -> None:
        """Generate the batches and write those of their images that are missing; show: with a progress bar."""
        family, wanted, source = models.open(self.source), self.wanted, self.source
        number = sum(row.file in self.missing for batch in self.batches for row in batch)
        with tqdm(total=number, desc=f"generating, {self.name}", unit=" images", disable=not show) as bar:
            for batch in self.batches:
                layouts = wanted.layouts and [wanted.layouts[row.prompt].pixels(source.resolution) for row in batch]
                images = sample(
                    family,
                    [row.prompt for row in batch],
                    [row.noise_seed for row in batch],
                    resolution=source.resolution,
                    steps=source.steps,
                    guidance=source.guidance,
                    batch_size=len(batch),
                    layouts=torch.stack(layouts) if layouts else None,
                    strength=wanted.strength or 1.0,
                )
                for row, image in zip(batch, images, strict=True):
                    if row.file in self.missing:
                        save_png(to_picture(image), self.out / row.file, _texts(row, wanted.strength) | self.about)
                        bar.update()


def _modules(family: Family) -> list[tuple[str, torch.nn.Module]]:
    parts = family.pipeline.components.items()
    return [(name, part) for name, part in parts if isinstance(part, torch.nn.Module)]


def _texts(row: ImageRow, strength: float | None) -> dict[str, str]:
    values = {**row._asdict(), "strength": strength}
    return {name: str(value) for name, value in values.items() if value is not None and name != "file"}


# ---- the folder --------------------------------------------------------------------------------------------------


def _settings(wanted: ImageRequest, device: torch.device) -> dict[str, object]:
    """What decides the images, as JSON has it."""
    models = {}
    for name, source in wanted.models.items():
        facts = asdict(source)
        for passing in ("mixed_precision", "attention", "cache_dir", "token"):
            del facts[passing]
        if source.zero_terminal_snr == "auto":  # as folders have it that were begun when samplers did not follow it
            del facts["zero_terminal_snr"]
        models[name] = {**facts, "dtype": str(compute_dtype(source, device)).removeprefix("torch.")}
    settings = {
        "models": models,
        "prompts": f"{len(wanted.prompts)} of digest {_digest(wanted.prompts)}",
        "seeds": list(wanted.seeds),
        "layouts": wanted.layouts and _digest({text: layout.digest for text, layout in wanted.layouts.items()}),
        "strength": wanted.strength,
    }
    return json.loads(json.dumps(settings))


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def _claim(wanted: ImageRequest, rows: Sequence[ImageRow], out: Path, device: torch.device) -> None:
    """Make `out` ours, or go on with it. Raises BadInput where it holds anything else."""
    _listing(out)  # raises for one that is not whole
    new = {"settings": _settings(wanted, device), "weights": {}, "stamps": {}, "signed": True, "complete": False}
    output_folder.claim(out, LISTING, _with_rows(new, rows), what="images", key="settings")
    for name in wanted.models:
        remove_temporaries(out / name)


def _unchanged(wanted: ImageRequest, out: Path) -> set[str]:
    """The models whose files are those that their images were made from, by sizes and times."""
    stamps = _listing(out)["stamps"]
    return {name for name, source in wanted.models.items() if stamps.get(name) == files_stamp(source)}


def _missing(wanted: ImageRequest, rows: Sequence[ImageRow], out: Path) -> list[str]:
    """The files that are not there, or are not the images that were written."""
    listing = _listing(out)

    def fault(row: ImageRow) -> str | None:
        path = out / row.file
        try:
            data = read_bytes(path)
            whole = png_is_whole(data)
            if whole is False or (whole is None and listing.get("signed")):
                return "it is damaged"
            texts = texts_of(io.BytesIO(data))
        except FileNotFoundError:
            return ""
        except (OSError, ValueError, SyntaxError) as error:  # of a PNG
            return f"it cannot be read, {error}"
        expected = _texts(row, wanted.strength) | {"digest": listing["weights"].get(row.model)}
        if differing := [name for name, text in expected.items() if texts.get(name) != text]:
            return f"it is another image's, by its {', '.join(differing)}"
        return None

    files = _each(rows)
    with ThreadPoolExecutor(THREADS) as pool:
        faults = list(pool.map(fault, files))
    for row, wrong in zip(files, faults, strict=True):
        if wrong:
            logger.warning("%s: %s; it is made again", out / row.file, wrong)
    return [row.file for row, wrong in zip(files, faults, strict=True) if wrong is not None]


def _same_weights(out: Path, about: Mapping[str, str], source: ModelSource) -> None:
    """Note the weights that the images of a model come from. Raises BadInput where there are images from others."""
    listing, name = _listing(out), about["model"]
    before = listing["weights"].setdefault(name, about["digest"])
    if before != about["digest"]:
        raise BadInput(
            f"--output_dir {out}: the weights of {name} ({about['weights']}) are not those that its images come from;"
            " name another folder"
        )
    listing["stamps"][name] = files_stamp(source)
    write_signed_json(out / LISTING, {**listing, "complete": False})


def _finish(wanted: ImageRequest, rows: Sequence[ImageRow], out: Path) -> None:
    listing = _listing(out)
    if not (listing["complete"] and (out / GRID).is_file()):
        save_png(_grid(wanted, rows, out), out / GRID)
        _write(out, {**listing, "complete": True}, rows)


def _grid(wanted: ImageRequest, rows: Sequence[ImageRow], out: Path) -> Image.Image:
    """Some prompts, evenly spread over the list, the first seed of each."""
    texts = list(dict.fromkeys(prompt.text for prompt in wanted.prompts))
    shown = [texts[k * len(texts) // min(COLUMNS, len(texts))] for k in range(min(COLUMNS, len(texts)))]
    pictures: dict[str, list[Image.Image]] = {}
    if wanted.layouts is not None:
        side = max(model.resolution for model in wanted.models.values())
        pictures["layout"] = [to_picture(wanted.layouts[text].pixels(side)) for text in shown]
    for name in wanted.models:
        files = [f"{name}/{file_stem(text)}-{wanted.seeds[0]}.png" for text in shown]
        pictures[name] = [Image.open(out / file).convert("RGB") for file in files]
    return picture_grid(pictures, shown, LARGEST_CELL)


def _listing(out: Path) -> dict | None:
    """images.json, or None where there is none."""
    return output_folder.read_record(out, LISTING, ("settings", "weights", "stamps", "complete", "images"))


def _write(out: Path, listing: Mapping[str, object], rows: Sequence[ImageRow]) -> None:
    write_signed_json(out / LISTING, _with_rows(listing, rows))


def _with_rows(listing: Mapping[str, object], rows: Sequence[ImageRow]) -> dict[str, object]:
    return {**listing, "images": [row._asdict() for row in rows]}
