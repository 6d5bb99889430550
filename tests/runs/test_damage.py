"""Every file that is read back, damaged: the result is the same to the bit, or one line names the file."""

import json
import logging
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from dpo_fast import relabel, scorers, sweep
from dpo_fast.checksums import write_signed_json
from dpo_fast.comparing.folders import places_of
from dpo_fast.comparing.overview import Overview, overview
from dpo_fast.comparing.reading import read_entry
from dpo_fast.errors import BadInput
from dpo_fast.evaluate import main as evaluate
from dpo_fast.generate import main as generate
from dpo_fast.relabeling import pair_scores
from dpo_fast.train import main as train
from tests.helpers import fake_scorers, made_runs, scorer_files
from tests.helpers.pairs import open_pairs, pickapic, write_table
from tests.helpers.runs import flags_for

pytestmark = pytest.mark.faults


@dataclass
class World:
    """A folder with files that a command reads back, and what comes of it."""

    folder: Path
    command: Callable[[], int]  # its exit status
    outcome: Callable[[], object]  # what must not change silently
    other: Path | None = None  # the folder of another run, whose files may get mixed up with these
    expected: object = field(init=False)

    def __post_init__(self) -> None:
        self.kept = shutil.copytree(self.folder, self.folder.with_name(self.folder.name + "-kept"))
        assert self.command() == 0
        self.expected = self.outcome()
        self.restore()

    def restore(self) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(self.kept, self.folder)


def damages(data: bytes, other: bytes | None, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """What becomes of a file's bytes, with a name."""
    size = len(data)
    for place in [chance.randrange(size), chance.randrange(size), 0, size - 1, *(size * k // 8 for k in range(1, 8))]:
        bit = 1 << chance.randrange(8)
        yield f"bit {bit} of byte {place} flipped", data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
    if other is not None and other != data:
        yield "another run's", other
    yield "empty", b""
    yield "cut in the middle", data[: size // 2]
    yield "its last byte lost", data[:-1]
    yield "a block of zeros", data[: size // 3] + bytes(min(512, size - size // 3)) + data[size // 3 + 512 :]
    for number in (b"0.", b"1.", b"2."):  # some number becomes none
        if data.isascii() and number in data:
            head, tail = data.split(number, 1)
            yield "not a number", head + b"NaN" + tail.lstrip(b"0123456789e-")
            break


def check(world: World, name: str, capfd: pytest.CaptureFixture, most: int | None) -> None:
    (file,) = [path for path in world.folder.glob(name) if path.is_file()][:1]
    data = file.read_bytes()
    other = world.other and next((path.read_bytes() for path in world.other.glob(name)), None)
    for number, (damage, changed) in enumerate(damages(data, other, random.Random(name))):
        if number == most:
            break
        world.restore()
        file.write_bytes(changed)
        logging.getLogger("dpo_fast").handlers.clear()  # they write to the standard error of another test
        capfd.readouterr()
        status = world.command()
        said = capfd.readouterr().err
        assert "Traceback" not in said, (damage, said)
        if status == 0:
            assert same(world.outcome(), world.expected), (name, damage, said)
            continue
        assert status == 2, (damage, said)
        (line,) = [text for text in said.replace("\r", "\n").splitlines() if text.startswith("dpo_fast: error: ")]
        assert any(part.name in line for part in (file, file.parent)), (damage, line)
    world.restore()


def same(one: object, two: object) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[name], two[name]) for name in one)
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


# ---- the commands ------------------------------------------------------------------------------------------------


def resumed(tools: SimpleNamespace) -> World:
    """A run with everything, stopped in the middle."""

    def flags(folder: Path, *more: object) -> list[str]:
        fixed = ["--checkpointing_steps", 2, "--use_ema", "--cached_reference", 1, "--run_validation"]
        fixed += ["--validation_steps", 2, "--validation_fraction", 0.2, "--validation_prompts", "a cat"]
        fixed += ["--sampling_steps", 1]
        fixed += ["--latent_cache_dir", folder / "cache", "--learning_rate", 1e-3]
        return flags_for(tools.model, tools.pairs, folder / "run", *fixed, *more)

    def outcome() -> dict:
        run = folder / "run"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return {
            **load_file(run / "checkpoint-4" / "weights.safetensors"),
            **{f"ema {k}": v for k, v in load_file(run / "checkpoint-4" / "ema.safetensors").items()},
            "lines": [(line["step"], line["loss"], line["grad_norm"]) for line in lines],
            "validation": (run / "validation.jsonl").read_text(),
            "samples": {file.name: file.read_bytes() for file in (run / "samples").iterdir()},
        }

    folder, other = tools.folder / "resumed", tools.folder / "another run"
    assert train(flags(folder, "--max_train_steps", 2)) == 0
    assert train(flags(other, "--max_train_steps", 2, "--seed", 1)) == 0
    return World(folder, lambda: train(flags(folder, "--resume_from_checkpoint", "latest")), outcome, other)


def swept(tools: SimpleNamespace) -> World:
    """A sweep that is done."""
    folder = tools.folder / "swept"
    flags = flags_for(
        tools.model, tools.pairs, folder / "sweep", "--learning_rate", "1e-3,2e-3", "--max_train_steps", 1
    )

    def run(jobs, slots, *, started, ended, waiting):
        for job in jobs:
            ended(job, train(job.command[3:]))

    tools.patch.setattr(sweep, "run_jobs", run)
    assert sweep.main(flags) == 0
    return World(folder, lambda: sweep.main(flags), lambda: json.loads((folder / "sweep" / "sweep.json").read_text()))


def generated(tools: SimpleNamespace) -> World:
    """Images of a run and its base that are done."""
    folder = tools.folder / "generated"
    assert train(flags_for(tools.model, tools.pairs, folder / "run", "--learning_rate", 1e-2)) == 0
    flags = ["--policy", folder / "run", "--prompts", "a cat", "a dog", "--output_dir", folder / "images"]
    flags = [str(word) for word in (*flags, "--sampling_steps", 1, "--resolution", 64, "--batch_size", 2)]
    assert generate(flags) == 0

    def outcome() -> dict:
        return {file.name: file.read_bytes() for file in (folder / "images").glob("*/*.png")}

    return World(folder, lambda: generate(flags), outcome, mixed(folder, tools.folder / "mixed"))


def mixed(folder: Path, other: Path) -> Path:
    """A copy in which the base's and the run's images changed places."""
    shutil.copytree(folder / "images", other / "images")
    for file in (folder / "images" / "run").glob("*.png"):
        shutil.copy(file, other / "images" / "base" / file.name)
    return other


def evaluated(tools: SimpleNamespace) -> World:
    """An evaluation that is done."""
    folder = tools.folder / "evaluated"
    assert train(flags_for(tools.model, tools.pairs, folder / "run", "--learning_rate", 1e-2)) == 0
    published = tools.folder / "published"
    scorer_files.write_all(published)
    flags = ["--policy", folder / "run", "--prompts", "a cat", "a dog", "--output_dir", folder / "out"]
    flags += ["--scorers", "clip", "--scorer_models", published, "--sampling_steps", 1, "--resolution", 64]
    flags = [str(word) for word in flags]
    assert evaluate(flags) == 0

    def outcome() -> dict:
        return pq.read_table(folder / "out" / "scores.parquet").to_pydict()

    return World(folder, lambda: evaluate(flags), outcome)


def compared(tools: SimpleNamespace) -> World:
    """A sweep and an evaluation that are compared: what is damaged has a line, which stands for an error here."""
    folder = tools.folder / "compared"
    for seed in (1, 2):
        made_runs.run(folder / "sweep" / f"seed={seed}", made_runs.scores(0.2, training=seed), seed=seed)
    rows = [{"seed": f"{seed}", "status": 0} for seed in (1, 2)]
    write_signed_json(folder / "sweep" / "sweep.json", {"flags": [], "swept": {"seed": ["1", "2"]}, "runs": rows})
    made_runs.evaluation(folder / "out", made_runs.scores(0.2), trained={"seed": 3})
    read: list[Overview] = []

    def command() -> int:
        places = places_of([folder / "sweep", folder / "out"])
        read[:] = [overview([read_entry(place) for place in places])]
        if read[0].missing:
            print(f"dpo_fast: error: {' '.join(read[0].missing)}", file=sys.stderr)
        return 2 if read[0].missing else 0

    return World(folder, command, lambda: [column.cells for table in read[0].tables for column in table.columns])


def _with_fakes(function, of_fake):
    """`function` of a scorer's name with `of_fake` for the fake scorers: other worlds of this module have real ones."""

    def answer(name, *device, **how):
        return of_fake(name) if name in fake_scorers.FORMULAS else function(name, *device, **how)

    return answer


def labelling(tools: SimpleNamespace, *, done: bool) -> World:
    """Pairs that are scored: the labels are there too, or are to be made of the scores."""
    folder = tools.folder / ("labelled" if done else "scored")
    tools.patch.setattr(pair_scores, "PART_ROWS", 4)
    tools.patch.setattr(scorers, "MODULE_OF", {**scorers.MODULE_OF, **dict.fromkeys(fake_scorers.FORMULAS, "fake")})
    of_fakes = {
        "load_scorer": lambda name: fake_scorers.load(name, tools.folder / "log"),
        "facts": lambda name: {"scorer": name},
        "provenance": lambda name: {"scorer": name},
    }
    for function, of_fake in of_fakes.items():
        tools.patch.setattr(scorers, function, _with_fakes(getattr(scorers, function), of_fake))

    def flags(folder: Path, seed: int) -> list[str]:
        if not (folder / "pairs.parquet").is_file():
            write_table(folder / "pairs.parquet", pickapic(n=10, size=(40, 24), seed=seed))
        more = ["--scorer", "red", "--temperature", 0.5, "--batch_size", 3]
        files = ["--dataset_name", folder / "pairs.parquet", "--output", folder / "out.parquet"]
        return [str(word) for word in (*files, *more)]

    other = tools.folder / f"other {folder.name}"
    for home, seed in ((folder, 0), (other, 1)):
        assert relabel.main(flags(home, seed)) == 0
    if not done:
        (folder / "out.parquet").unlink()
        (folder / "out.json").unlink()

    def outcome() -> dict:
        report = json.loads((folder / "out.json").read_text())
        return {"pairs": pq.read_table(folder / "out.parquet").to_pydict(), "report": report}

    return World(folder, lambda: relabel.main(flags(folder, 0)), outcome, other)


def taught(tools: SimpleNamespace) -> World:
    """Labels that are trained on."""
    labelled = labelling(tools, done=True)
    folder = shutil.copytree(labelled.folder, tools.folder / "taught")
    read: list[tuple] = []

    def command() -> int:
        try:
            source = open_pairs(str(folder / "out.parquet"))
            read[:] = [(source.captions(), source.labels())]
        except BadInput as error:
            print(f"dpo_fast: error: {error}", file=sys.stderr)
            return 2
        return 0

    return World(folder, command, lambda: list(read))


WORLDS = {
    "resumed": resumed,
    "swept": swept,
    "generated": generated,
    "evaluated": evaluated,
    "compared": compared,
    "scored": lambda tools: labelling(tools, done=False),
    "labelled": lambda tools: labelling(tools, done=True),
    "taught": taught,
}
FILES = [
    ("resumed", "run/checkpoint-2/state.json"),
    ("resumed", "run/checkpoint-2/weights.safetensors"),
    ("resumed", "run/checkpoint-2/optimizer.safetensors"),
    ("resumed", "run/checkpoint-2/ema.safetensors"),
    ("resumed", "run/metrics.jsonl"),
    ("resumed", "run/validation.jsonl"),
    ("resumed", "run/samples/base-0.png"),
    ("resumed", "cache/latents-*/recipe.json"),
    ("resumed", "cache/latents-*/shard-*.json"),
    ("resumed", "cache/latents-*/shard-*.bin"),
    ("resumed", "cache/text-*/recipe.json"),
    ("resumed", "cache/text-*/shard-*.json"),
    ("resumed", "cache/text-*/shard-*.bin"),
    ("resumed", "cache/reference-*/recipe.json"),
    ("resumed", "cache/reference-*/shard-*.json"),
    ("resumed", "cache/reference-*/shard-*.bin"),
    ("resumed", "cache/pairs-*/manifest.json"),
    ("resumed", "cache/pairs-*/rows-*.parquet"),
    ("swept", "sweep/sweep.json"),
    ("swept", "sweep/learning_rate=1e-3/summary.json"),
    ("generated", "run/config.yaml"),
    ("generated", "run/summary.json"),
    ("generated", "run/pytorch_lora_weights.safetensors"),
    ("generated", "images/images.json"),
    ("generated", "images/base/*.png"),
    ("evaluated", "out/evaluation.json"),
    ("evaluated", "out/images/images.json"),
    ("evaluated", "out/images/base/*.png"),
    ("evaluated", "out/scores/clip-*/recipe.json"),
    ("evaluated", "out/scores/clip-*/shard-0-00000.json"),
    ("evaluated", "out/scores/clip-*/shard-0-00000.bin"),
    ("compared", "sweep/sweep.json"),
    ("compared", "sweep/seed=1/config.yaml"),
    ("compared", "sweep/seed=2/summary.json"),
    ("compared", "sweep/seed=2/scores.parquet"),
    ("compared", "out/summary.json"),
    ("compared", "out/scores.parquet"),
    ("scored", "out.scores/red-*/recipe.json"),
    ("scored", "out.scores/red-*/shard-0-00000.json"),
    ("scored", "out.scores/red-*/shard-0-00000.bin"),
    ("labelled", "out.parquet"),
    ("labelled", "out.json"),
    ("taught", "out.parquet"),
]


@pytest.fixture(scope="module")
def world_of(sdxl_path, pairs, tmp_path_factory) -> Iterator[Callable[[str], World]]:
    made: dict[str, World] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))

        def world(name: str) -> World:
            if name not in made:
                tools = SimpleNamespace(folder=tmp_path_factory.mktemp(name), model=sdxl_path, pairs=pairs, patch=patch)
                made[name] = WORLDS[name](tools)
            return made[name]

        yield world


@pytest.mark.slow
@pytest.mark.drawn(12)
@pytest.mark.parametrize("name, file", FILES, ids=lambda value: value)
def test_a_flipped_bit_is_made_good_or_named(world_of, name, file, capfd):
    check(world_of(name), file, capfd, most=1)


@pytest.mark.exhaustive
@pytest.mark.drawn(5)
@pytest.mark.parametrize("name, file", FILES, ids=lambda value: value)
def test_any_damage_is_made_good_or_named(world_of, name, file, capfd):
    check(world_of(name), file, capfd, most=None)
