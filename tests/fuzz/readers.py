"""Every reader of files, each with small valid files to start from and the code that reads them."""

import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save, save_file

from dpo_fast import command_line, config, hub_revisions, output_folder, store
from dpo_fast.caching import ref_errors, upkeep
from dpo_fast.caching.manifest import Manifest
from dpo_fast.caching.reader import CachedItems
from dpo_fast.checksums import (
    file_digest,
    read_signed_json,
    signed_png,
    signed_text,
    write_signed_json,
)
from dpo_fast.comparing.folders import places_of
from dpo_fast.comparing.formats import as_csv, latex, markdown, terminal
from dpo_fast.comparing.overview import overview
from dpo_fast.comparing.page import page
from dpo_fast.comparing.reading import read_entry
from dpo_fast.data import build_index
from dpo_fast.data.images import BadImage, decode, scaled
from dpo_fast.data.pairs import judge_streamed
from dpo_fast.data.pairs_source import split_names
from dpo_fast.data.relabelled import DIGEST, LabelDigest, check_labels
from dpo_fast.data.sources import BadRow, Identity, StreamedSource
from dpo_fast.errors import BadInput
from dpo_fast.evaluation import generation
from dpo_fast.evaluation.prompts import read_lines, read_prompts
from dpo_fast.models import load, merging
from dpo_fast.models.kinds import header
from dpo_fast.models.marks import marks_of_file
from dpo_fast.models.source import ModelSource
from dpo_fast.relabeling import labels
from dpo_fast.scorers import kept_scores
from dpo_fast.store import Field, Recipe
from dpo_fast.training import checkpoint, metrics, run_folder
from tests.helpers import made_runs, pipelines
from tests.helpers.pairs import (
    as_image_feature,
    encoded,
    open_pairs,
    pickapic,
    write_arrow_file,
    write_jsonl,
    write_table,
)

COLUMNS = dict(n=3, size=16, captions=["a red square", "two dogs", "Zürich"])


met: list[str] = []  # the errors that a case met, and that did not keep it from reading on


@contextmanager
def refused(*errors: type[Exception]) -> Iterator[None]:
    """Errors of the block that are as they should be: noted in `met`, and the reader goes on with what is next."""
    try:
        yield
    except errors as error:
        met.append(type(error).__name__)


class Reader(NamedTuple):
    """How a kind of files is written, and how it is read."""

    write: Callable[[Path], object]  # valid files into an empty folder
    read: Callable[[Path, Iterable[str]], object]  # all of a folder; the names are of what was changed
    weight: float  # cases of the long version: its share, by what a case costs
    confined: tuple[str, ...] = ()  # where links may not lead out of the folder; elsewhere they are the user's own
    named: tuple[type[Exception], ...] = ()  # errors that it documents, beside those of all readers
    peak_mib: int = 256  # memory that a case may take


# ---- pairs -------------------------------------------------------------------------------------------------------


def _index(folder: Path, changed: Iterable[str]) -> None:
    source = open_pairs(folder)
    split_names(folder)
    source.identity.stamp, source.identity.rows, source.identity.images, source.row_stamp(0) if len(source) else None
    build_index(source, seed=0, max_bad_fraction=1.0, validation_fraction=0.3, progress=False)


def _stream(folder: Path, changed: Iterable[str]) -> None:
    source = open_pairs(folder, streaming=True)
    assert isinstance(source, StreamedSource)
    for row in source.rows():
        judge_streamed(row, source.columns, soft_labels=True)
        for image in row.images:
            if isinstance(image, bytes):
                with refused(BadImage):
                    decode(image)


def _write_saved(folder: Path) -> None:
    table = as_image_feature(pickapic(**COLUMNS))
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(folder))


def _relabelled(folder: Path) -> None:
    """A file with a digest of its labels, as `relabel` writes them."""
    columns = pickapic(**COLUMNS)
    whole = LabelDigest()
    for row in zip(columns["label_0"], columns["caption"], strict=True):
        whole.update(row)
    schema = pa.table(columns).schema.with_metadata({DIGEST: whole.hexdigest().encode()})
    pq.write_table(pa.table(columns, schema=schema), folder / "train.parquet", write_page_checksum=True)
    note = {labels.NOTE: json.dumps({"pairs": 3}).encode(), DIGEST: whole.hexdigest().encode()}
    pq.write_table(pa.table(columns).replace_schema_metadata(note), folder / "noted.parquet", write_page_checksum=True)
    labels.write_counts(folder / "noted.parquet", {"pairs": 3})


def _read_relabelled(folder: Path, changed: Iterable[str]) -> None:
    for name in ("noted.parquet", "train.parquet"):
        if not (folder / name).exists():
            continue
        with refused(BadInput):
            labels.note_of(folder / name)
        with refused(BadInput):
            check_labels(folder / name)
        with refused(BadInput):
            labels.check_output(folder / name)


# ---- images ------------------------------------------------------------------------------------------------------


def _write_images(folder: Path) -> None:
    image = Image.open(io.BytesIO(encoded(np.random.default_rng(0), 16, "PNG")))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    text = PngInfo()
    text.add_text("prompt", "a cat", zip=True)
    image.save(folder / "a.png", exif=exif, icc_profile=profile, pnginfo=text)
    image.quantize(4).save(folder / "p.png", transparency=1)
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16)).save(folder / "i.png")
    image.save(folder / "b.jpg", exif=exif, icc_profile=profile, quality=80)
    image.convert("CMYK").save(folder / "c.jpg")
    image.save(folder / "w.webp", exif=exif, icc_profile=profile)
    image.save(folder / "t.tif", compression="tiff_lzw")
    image.save(folder / "g.gif")
    image.save(folder / "b.bmp")
    (folder / "s.png").write_bytes(signed_png((folder / "p.png").read_bytes()))


def _read_images(folder: Path, changed: Iterable[str]) -> None:
    for name in changed:
        if not (folder / name).is_file() or (folder / name).is_symlink():
            continue
        data = (folder / name).read_bytes()
        with refused(BadImage):
            decode(data)
        with refused(BadImage):
            scaled(data, 32)


# ---- the cache ---------------------------------------------------------------------------------------------------

_LATENTS = Recipe(
    "latents", {"weights": "0123", "resolution": 64, "list": [1, {"a": None}]}, (Field("latents", (4, 2, 2)),)
)
_REFERENCE = Recipe("reference", {"weights": "0123"}, ref_errors.FIELDS)


def _write_cache(folder: Path) -> None:
    store.begin_folder(folder, _LATENTS)
    with store.Writer(folder, _LATENTS, 0) as writer:
        for row in range(4):
            writer.add(bytes([row]) * 16, bytes([row]) * _LATENTS.record_bytes, [64, 64, 0, 0] if row else {"bad": "x"})
    with suppress(StopIteration), store.Writer(folder, _LATENTS, 0) as writer:
        for row in range(5, 8):
            writer.add(bytes([row]) * 16, bytes([row]) * _LATENTS.record_bytes, [64, 64, row])
        raise StopIteration


def _read_cache(folder: Path, changed: Iterable[str]) -> None:
    for entry in upkeep.entries(folder):
        assert entry.bytes >= 0
    list(upkeep.verify(folder))
    with refused(BadInput):
        whole = store.Store(folder, _LATENTS)
        items = CachedItems(whole)
        keys = sorted(whole.keys())
        items.meta(keys)
        for key in keys:
            with refused(BadInput):
                items.read([key, None])
    with refused(BadInput):
        store.drop_damaged(folder, _LATENTS)
    store.log_keys(folder / _LATENTS.folder_name)
    store.tidy(folder, _LATENTS)
    with refused(BadInput):
        len(store.Store(folder, _LATENTS))
    list(upkeep.verify(folder, remove=True))


def _blocks() -> ref_errors.ErrorBlocks:
    def pair_of(row: int) -> ref_errors.ScoredPair:
        images = bytes([row % 256]) * 16, BadImage("is missing", "jpg_1")
        return ref_errors.ScoredPair(row, images, f"caption {row}", row % 2)

    return ref_errors.ErrorBlocks([0, 1, 5, 300], pair_of, 2)


def _write_reference(folder: Path) -> None:
    store.begin_folder(folder, _REFERENCE)
    values = np.random.default_rng(0).random((ref_errors.BLOCK, 2), np.float32)
    with store.Writer(folder, _REFERENCE, 0) as writer:
        for unit in _blocks().units:
            writer.add(unit.key, values.tobytes(), {"torch": "2.13", "device": "cpu"})


def _read_reference(folder: Path, changed: Iterable[str]) -> None:
    found = ref_errors.RefErrors(store.Store(folder, _REFERENCE), _blocks())
    found.read(torch.tensor([0, 1, 300]), torch.tensor([0, 1, 1]), [0, 1, 0])


def _write_manifest(folder: Path) -> None:
    source = SimpleNamespace(
        description="pairs, split train",
        identity=Identity("pairs", ""),
        columns=open_pairs(_pairs(folder.parent)).columns,
    )
    manifest = Manifest(folder)
    manifest.begin(source)
    manifest.note(0, (b"a" * 16, b"b" * 16), ("a caption", 1.0))
    manifest.note_decoded(0, None)
    manifest.note(1, (b"c" * 16, BadImage("is missing", "jpg_1")), (None, None))
    manifest.save(ended=True)
    manifest.note(2, (b"e" * 16, b"f" * 16), ("two\nlines", {"labels": [0.2, 0.3]}))
    manifest.note_decoded(2, BadRow(2, "jpg_0", "cannot be decoded"))
    manifest.save_part()


def _pairs(folder: Path) -> Path:
    return write_jsonl(folder / "pairs-of-the-manifest", pickapic(n=1, size=8))


def _read_manifest(folder: Path, changed: Iterable[str]) -> None:
    manifest = Manifest(folder)
    for row in range(3):
        if row in manifest:
            manifest.images(row)
            manifest.bad(row)
            with suppress(KeyError):  # nobody tried
                manifest.decodes(row)
    if manifest.about is not None:
        assert manifest.columns.images
        for row in manifest.stream().rows():
            judge_streamed(row, manifest.columns, soft_labels=True)


# ---- runs --------------------------------------------------------------------------------------------------------


def _write_checkpoint(folder: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0), "c": torch.tensor(1, dtype=torch.int8)}
    state = {
        "step": 2,
        "pairs_seen": 8,
        "config": {"seed": 1, "resolution": 64},
        "bad_rows": [[1, "a", "b"]],
        "notes": {},
    }
    checkpoint.save(folder, 2, {"weights": tensors, "optimizer": {"x": torch.ones(2)}}, state)


def _read_checkpoint(folder: Path, changed: Iterable[str]) -> None:
    for name in changed:  # whoever forges a digest too
        _sign_file(folder / "checkpoint-2", Path(name).name)
    checkpoint.load(checkpoint.find(folder, "latest"))


def _sign_file(folder: Path, name: str) -> None:
    """Let state.json have the checksum that a changed file has now, where both can be read."""
    if not name.endswith(".safetensors"):
        return
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        if (folder / name).is_symlink() or not (folder / name).is_file() or not (folder / "state.json").is_file():
            return
        state = json.loads((folder / "state.json").read_bytes())
        state["files"][name.removesuffix(".safetensors")] = file_digest(folder / name)
        del state["digest"]
        write_signed_json(folder / "state.json", state)


_LINES = "".join(json.dumps({"step": step, "loss": 0.7}) + "\n" for step in (1, 2, 3))


def _write_run(folder: Path) -> None:
    save_file({"unet.a.lora_A.weight": torch.ones(2, 2)}, folder / "pytorch_lora_weights.safetensors")
    whole = {"pytorch_lora_weights.safetensors": file_digest(folder / "pytorch_lora_weights.safetensors")}
    write_signed_json(folder / "summary.json", {"steps": 3, "win_rate": 0.5, "uploaded": "x", "result": whole})
    settings = config.TrainConfig(pretrained_model_name_or_path="m", dataset_name="p", seed=1)
    (folder / "config.yaml").write_text(signed_text(config.to_yaml(settings)))
    (folder / "metrics.jsonl").write_text(_LINES)
    (folder / "bad_rows.jsonl").write_text("")


def _read_run(folder: Path, changed: Iterable[str]) -> None:
    run_folder.is_finished(folder, 3, evaluated=True, uploaded=True)
    output_folder.is_free(folder)
    whole = xxhash.xxh3_128_hexdigest(_LINES[:66].encode())
    for extent in (None, metrics.Extent(66, whole)):
        with refused(BadInput, FileNotFoundError):
            metrics.kept_lines(folder / "metrics.jsonl", 2, extent)
    with refused(BadInput):
        command_line._recipe_flags(folder / "config.yaml")
    run_folder.check_result(folder)


_SCORES = Recipe("x", {"scorer": "x", "version": "1"}, (Field("score", (), "float64"),), kept_scores.REMEDIES)


def _write_scores(folder: Path) -> None:
    store.begin_folder(folder, _SCORES)
    with store.Writer(folder, _SCORES, 0, capacity=3) as writer:
        for row in range(3):
            writer.add(bytes([row]) * 16, np.float64(row / 7).tobytes())
    with suppress(StopIteration), store.Writer(folder, _SCORES, 1) as writer:
        writer.add(bytes([9]) * 16, np.float64(0.5).tobytes(), ["jpg_0", "x"])
        raise StopIteration
    write_signed_json(folder / "evaluation.json", {"prompts": ["a"], "seeds": [1]})
    listing = {
        "settings": {},
        "weights": {},
        "complete": True,
        "stamps": {"m": "s"},
        "images": [{"file": "m/1.png", "prompt": "a", "seed": 1}],
    }
    write_signed_json(folder / "images.json", listing)


def _read_scores(folder: Path, changed: Iterable[str]) -> None:
    with refused(BadInput):
        store.mend(folder, _SCORES, ranks=0)
        kept_scores.read_scores(folder, _SCORES)
    with refused(BadInput):
        generation._listing(folder)
    with refused(BadInput):
        read_signed_json(folder / "evaluation.json", "put it back", ("prompts",))


def _write_compared(folder: Path) -> None:
    """A sweep of two runs, and an evaluation."""
    few = tuple(f"prompt {number}" for number in range(3))
    for seed in (1, 2):
        of = made_runs.scores(0.3, prompts=few, training=seed)
        made_runs.run(folder / "sweep" / f"seed={seed}", of, seed=seed, steps=4, lines=2)
    rows = [{"seed": "1", "status": 0}, {"seed": "2", "status": 0}, {"seed": "3", "status": 2}]
    write_signed_json(folder / "sweep" / "sweep.json", {"flags": [], "swept": {"seed": ["1", "2", "3"]}, "runs": rows})
    made_runs.evaluation(folder / "evaluation", made_runs.scores(0.3, prompts=few), trained={"seed": 3})


def _read_compared(folder: Path, changed: Iterable[str]) -> None:
    places = places_of([folder / "sweep", folder / "evaluation"])
    found = overview([read_entry(place) for place in places], pool_seeds=True)
    for write in (terminal, as_csv, markdown, latex):
        write(found)
    page(found, "today")


# ---- what users write --------------------------------------------------------------------------------------------


def _write_prompts(folder: Path) -> None:
    (folder / "prompts.txt").write_text("a red square\n\ntwo dogs\nZürich\n", encoding="utf-8")
    (folder / "table.tsv").write_text("Prompt\tCategory\tChallenge\na man\tPeople\tx\na dog\tAnimals\n")
    (folder / "hps").mkdir()
    for style in ("anime", "concept-art", "paintings", "photo"):
        (folder / "hps" / f"{style}.json").write_text(json.dumps(["a", "b"]))
    write_table(folder / "pick.parquet", {"caption": ["a", "b", "a"], "jpg_0": [b"x"] * 3})


def _read_prompts(folder: Path, changed: Iterable[str]) -> None:
    kinds = {name.partition("/")[0] for name in changed}
    with refused(BadInput):
        if "prompts.txt" in kinds:
            read_lines(folder / "prompts.txt", "--validation_prompts")
    for kind, asked in {
        "prompts.txt": [str(folder / "prompts.txt")],
        "table.tsv": [str(folder / "table.tsv"), f"partiprompts={folder / 'table.tsv'}"],
        "hps": [f"hps={folder / 'hps'}"],
        "pick.parquet": [f"pickapic-validation={folder / 'pick.parquet'}"],
    }.items():
        for one in asked if kind in kinds else ():
            with refused(BadInput):
                read_prompts([one], people=one.endswith("tsv"), most=2)


def _write_recipe(folder: Path) -> None:
    settings = config.TrainConfig(pretrained_model_name_or_path="m", dataset_name="p", seed=1, max_train_steps=5)
    (folder / "recipe.yaml").write_text(config.to_yaml(settings))


def _read_recipe(folder: Path, changed: Iterable[str]) -> None:
    command_line._recipe_flags(folder / "recipe.yaml")


def _parse_recipe(folder: Path, changed: Iterable[str]) -> None:
    command_line.parse(["--config", str(folder / "recipe.yaml")])


# ---- models ------------------------------------------------------------------------------------------------------


def _write_single_files(folder: Path) -> None:
    tensors = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 4, 1, 1),
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.ones(2),
    }
    sd15 = {**tensors, "cond_stage_model.transformer.text_model.a": torch.ones(1)}
    sd2 = {**tensors, "cond_stage_model.model.a": torch.ones(1), "v_pred": torch.zeros(0)}
    sdxl = {
        **tensors,
        "conditioner.embedders.0.transformer.a": torch.ones(1),
        "conditioner.embedders.1.model.a": torch.ones(1),
    }
    said = {"modelspec.prediction_type": "v", "modelspec.architecture": "stable-diffusion-v1"}
    for name, state, metadata in (("sd15", sd15, None), ("sd2", sd2, said), ("sdxl", sdxl, {"format": "pt"})):
        (folder / f"{name}.safetensors").write_bytes(save(state, metadata))


def _read_single_files(folder: Path, changed: Iterable[str]) -> None:
    for name in changed:
        path = str(folder / name)
        hub_revisions.revision_of(path)
        load.family_of(ModelSource(path))
        with refused(BadInput):
            load.config_source(path, "sd2" if name.startswith("sd2") else None)
        with refused(BadInput):
            marks_of_file(path, *header(path), None)
        with refused(BadInput):
            load._check_sd2(path, {"prediction_type": "epsilon"})


def _write_pipeline(folder: Path) -> None:
    """The configuration of a pipeline, without its weights."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, content in {
        "unet/config.json": {"_class_name": "UNet2DConditionModel", "sample_size": 8, "cross_attention_dim": 32},
        "vae/config.json": {"_class_name": "AutoencoderKL", "scaling_factor": 0.18, "block_out_channels": [8, 8]},
        "scheduler/scheduler_config.json": {
            "_class_name": "PNDMScheduler",
            "beta_schedule": "linear",
            "num_train_timesteps": 1000,
        },
        ".cache/huggingface/download/model_index.json.metadata": None,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{'a' * 40}\netag\n1.5\n" if content is None else json.dumps(content))


def _read_pipeline(folder: Path, changed: Iterable[str]) -> None:
    path = str(folder)
    for look in (
        lambda: load.family_of(ModelSource(path)),
        lambda: load.component_config(ModelSource(path), "unet"),
        lambda: load.component_config(ModelSource(path), "vae"),
        lambda: load.revisions(ModelSource(path, vae_path=path)),
    ):
        with refused(BadInput):
            look()
    hub_revisions.revision_of(path, kind="dataset")


_held: dict[str, object] = {}


def _small_pipeline(folder: Path) -> pipelines.StableDiffusionPipeline:
    parts = {"safety_checker": None, "feature_extractor": None}
    return pipelines.StableDiffusionPipeline.from_pretrained(pipelines.make_sd15(folder), **parts)


def _write_lora(folder: Path) -> None:
    if "pipeline" not in _held:
        _held["pipeline"] = _small_pipeline(folder.parent / "base-of-the-lora")
    unet = _held["pipeline"].unet
    layer = next(name for name, _ in unet.named_modules() if name.endswith("to_q"))
    rows, columns = unet.get_submodule(layer).weight.shape
    a, b = torch.ones(2, columns) / 64, torch.ones(rows, 2) / 64
    peft = {f"unet.{layer}.lora_A.weight": a, f"unet.{layer}.lora_B.weight": b}
    settings = {"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {"to_q": 4}, "unet.target_modules": ["to_q"]}
    kohya = "lora_unet_" + layer.replace(".", "_")
    old = {f"{kohya}.lora_down.weight": a, f"{kohya}.lora_up.weight": b, f"{kohya}.alpha": torch.tensor(1.0)}
    (folder / "peft.safetensors").write_bytes(
        save(peft, {"format": "pt", "lora_adapter_metadata": json.dumps(settings)})
    )
    (folder / "kohya.safetensors").write_bytes(save(old))


def _read_lora(folder: Path, changed: Iterable[str]) -> None:
    for name in changed:
        with refused(BadInput):
            merging.merge_lora(_held["pipeline"], folder / name)


READERS = {
    "JSONL": Reader(lambda f: write_jsonl(f, pickapic(**COLUMNS)), _index, 5, confined=("images/",)),
    "JSONL, streamed": Reader(lambda f: write_jsonl(f, pickapic(**COLUMNS)), _stream, 8, confined=("images/",)),
    "parquet": Reader(lambda f: write_table(f / "train.parquet", pickapic(**COLUMNS)), _index, 0.6),
    "parquet, streamed": Reader(lambda f: write_table(f / "train.parquet", pickapic(**COLUMNS)), _stream, 4),
    "Arrow": Reader(lambda f: write_arrow_file(f / "train.arrow", pickapic(**COLUMNS)), _index, 1),
    "Arrow, streamed": Reader(lambda f: write_arrow_file(f / "train.arrow", pickapic(**COLUMNS)), _stream, 0.6),
    "save_to_disk": Reader(_write_saved, _index, 1),
    "relabelled parquet": Reader(_relabelled, _read_relabelled, 6),
    "images and metadata": Reader(_write_images, _read_images, 14, peak_mib=2048),
    "cache shards": Reader(_write_cache, _read_cache, 6),
    "cache manifest": Reader(_write_manifest, _read_manifest, 6),
    "reference errors": Reader(_write_reference, _read_reference, 6, named=(KeyError,)),
    "checkpoint": Reader(_write_checkpoint, _read_checkpoint, 8),
    "run folder": Reader(_write_run, _read_run, 6),
    "scores": Reader(_write_scores, _read_scores, 8),
    "runs side by side": Reader(_write_compared, _read_compared, 0.5),
    "prompts": Reader(_write_prompts, _read_prompts, 6),
    "YAML recipe": Reader(_write_recipe, _read_recipe, 4),
    "YAML recipe, parsed": Reader(_write_recipe, _parse_recipe, 0.3),
    "single-file model": Reader(_write_single_files, _read_single_files, 10),
    "pipeline folder": Reader(_write_pipeline, _read_pipeline, 6),
    "LoRA": Reader(_write_lora, _read_lora, 3),
}
