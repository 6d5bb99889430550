"""What `import dpo_fast` offers: names, settings, runs that are the command's, and a process left as it was."""

import ast
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dpo_fast
from dpo_fast import BadInput, Callback, Interrupted, TrainConfig, load_pairs, score_images, train
from dpo_fast.api import training
from dpo_fast.api.options import settled_options
from dpo_fast.command_line import command_of, parse, parse_settings
from dpo_fast.config import resolve
from dpo_fast.evaluation import evaluate_options, generate_options
from dpo_fast.parallel import STATES
from dpo_fast.presets import PRESETS
from dpo_fast.scorers import Scorer
from dpo_fast.train import main
from tests.helpers.pairs import pickapic, write_pickapic, write_table
from tests.helpers.runs import assert_same_state, environment, flags_for, lines

ROOT = Path(dpo_fast.__file__).parents[1]
COMMANDS = ("evaluate", "generate", "train")  # functions and modules alike


def settings_for(model: Path, pairs: Path, out: Path, **more: object) -> dict[str, object]:
    """The settings of `flags_for`."""
    words = flags_for(model, pairs, out)
    return dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True)) | more


# ---- the names -------------------------------------------------------------------------------------------------


def test_importing_loads_nothing_heavy_and_a_function_is_never_replaced_by_its_command():
    script = """
import sys
import dpo_fast
assert "train" in dir(dpo_fast) and "train" not in vars(dpo_fast)
import dpo_fast.train, dpo_fast.evaluate, dpo_fast.generate
assert not {"train", "evaluate", "generate"} & vars(dpo_fast).keys(), "a module hides a function"
assert dpo_fast.TrainConfig(preset="sdxl").pairs_per_step == 2048 and dpo_fast.BadInput
print(sorted({"torch", "numpy", "PIL", "diffusers"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_s_module_can_be_imported_before_and_after(monkeypatch, name):
    function = getattr(dpo_fast, name)
    assert isinstance(function, types.FunctionType) and function.__module__.startswith("dpo_fast.api.")
    monkeypatch.delitem(sys.modules, f"dpo_fast.{name}", raising=False)
    module = importlib.import_module(f"dpo_fast.{name}")  # sets the package's attribute, as any import does
    assert module is sys.modules[f"dpo_fast.{name}"] and callable(module.main)
    assert getattr(dpo_fast, name) is function
    namespace: dict[str, object] = {}
    exec(f"from dpo_fast import {name} as it\nfrom dpo_fast.{name} import main", namespace)
    assert namespace["it"] is function and namespace["main"] is module.main
    monkeypatch.delitem(vars(dpo_fast), name)  # as before the first use
    assert getattr(dpo_fast, name) is function


def test_other_modules_of_the_package_are_still_modules():
    from dpo_fast import scorers, sweep

    assert isinstance(sweep, types.ModuleType) and isinstance(scorers, types.ModuleType)


def test_the_names_agree_everywhere():
    """With what editors see, what is documented, and what there is."""
    tree = ast.parse(Path(dpo_fast.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module.removeprefix("dpo_fast.") for node in block.body for alias in node.names}
    assert seen == dpo_fast._PUBLIC
    assert set(dpo_fast.__all__) == {"__version__", *seen} and set(dpo_fast.__all__) <= set(dir(dpo_fast))
    page = (ROOT / "docs" / "python.md").read_text()
    for name in seen:
        value = getattr(dpo_fast, name)
        assert value.__doc__ and value.__name__ == name
        assert f"`{name}" in page, f"docs/python.md says nothing of {name}"


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'dpo_fast' has no attribute 'trian'"):
        dpo_fast.trian  # noqa: B018
    assert not hasattr(dpo_fast, "_nothing")


# ---- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_mean_what_flags_mean(preset):
    flags = ["--preset", preset, "--rank", "8", "--hflip", "--lora_targets", "to_q", "to_k", "--seed", "3"]
    flags += ["--no_cache", "--output_dir", "a b", "--learning_rate", "3e-5"]
    settings = {"preset": preset, "rank": 8, "hflip": True, "lora_targets": ("to_q", "to_k"), "seed": 3}
    settings |= {"cache": False, "output_dir": Path("a b"), "learning_rate": 3e-5}
    expected = parse(flags)
    assert parse_settings(settings) == expected
    assert resolve(TrainConfig(**settings)) == expected
    assert parse_settings(training._settings_of(TrainConfig(**settings))) == expected


def test_where_nothing_is_named_the_built_in_world_is_meant():
    assert parse_settings({}) == parse([]) == resolve(TrainConfig())
    assert parse_settings({"max_train_steps": 3})[0].preset == TrainConfig(max_train_steps=3).preset == "shapes"
    assert TrainConfig(dataset_name="p").preset is None and TrainConfig(dataset_name="p").tuning == "lora"
    assert TrainConfig(preset="sdxl", objective="mapo").beta_dpo is None  # the preset's is on the scale of dpo


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_a_configuration_is_its_command_line(preset):
    """Whatever differs from the preset, and nothing else, is a flag."""
    named = {"preset": preset} if preset else {"pretrained_model_name_or_path": "m", "dataset_name": "p q"}
    config = parse_settings(named)[0]
    assert command_of(config) == [word for name, value in named.items() for word in (f"--{name}", value)]
    changed = {"tuning": "lora", "rank": 7, "eval_scorers": [], "eval_prompts": None, "max_grad_norm": 0.0}
    changed |= {"image_columns": ["a", "b"], "objective": "mapo", "hub_token": "secret", "sampling_guidance": 1.25}
    config = parse_settings({**named, **changed})[0]
    command = command_of(config)
    assert parse(command)[0] == dataclasses.replace(config, hub_token=None)
    assert not any("secret" in word for word in command)
    assert command[command.index("--objective") + 1] == "mapo" and command[command.index("--rank") + 1] == "7"
    assert "--learning_rate" not in command
    assert command_of(parse_settings({**named, "dataset_name": "--odd"})[0])[-1] == "--dataset_name=--odd"


REFUSED = [
    (dict(max_train_stps=3), "unknown flag 'max_train_stps' (did you mean --max_train_steps?)"),
    (dict(max_train_steps="many"), "many"),
    (dict(max_train_steps=0), "--max_train_steps (0) must be at least 1"),
    (dict(tuning="half"), "half"),
    (dict(image_columns={"a": 1}), "image_columns holds a dict"),
    (dict(dry_run=True), "python -m dpo_fast.train --dry_run"),
    (dict(config="nowhere.yaml"), "nowhere.yaml"),
    (dict(objective="dpop"), "dpop"),
    (dict(objective=3), "objective=3 is neither"),
    (dict(objective="python:mine"), "python:mine is a function that was given in Python"),
    (dict(callbacks=Callback()), "callbacks must be a list"),
    (dict(callbacks=[Callback]), "make an object of it, Callback()"),
    (dict(callbacks=[print]), "derive it from Callback"),
]


@pytest.mark.parametrize(("settings", "said"), REFUSED, ids=[", ".join(settings) for settings, _ in REFUSED])
def test_settings_that_are_refused(tmp_path, settings, said):
    with pytest.raises(BadInput) as refusal:
        train(**{"preset": "shapes", "output_dir": tmp_path / "run"} | settings)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_a_configuration_and_settings_exclude_each_other(tmp_path):
    with pytest.raises(BadInput, match=r"^rank: give a TrainConfig or settings, not both; dataclasses.replace"):
        train(TrainConfig(preset="shapes"), rank=8)
    with pytest.raises(BadInput, match="does not read the file"):
        train(TrainConfig(preset="shapes", config=tmp_path / "r.yaml"))
    with pytest.raises(BadInput, match=r"^\['shapes'\] is no TrainConfig"):
        train(["shapes"])


def test_options_of_the_other_commands_are_parsed_like_their_flags(tmp_path):
    flags = ["--policy", "a", "--prompts", "a cat", "a dog", "--seeds", "2", "--sampling_steps", "3", "--is_turbo"]
    settings = dict(policy="a", prompts=["a cat", "a dog"], seeds=2, sampling_steps=3, is_turbo=True)
    for options, kind in ((generate_options, "GenerateConfig"), (evaluate_options, "EvaluateConfig")):
        kind, expected = getattr(dpo_fast, kind), options.parse(flags)
        assert settled_options(kind, options.parse, None, settings) == expected
        assert settled_options(kind, options.parse, expected, {}) == expected
        with pytest.raises(BadInput, match=f"give a {kind.__name__} or settings"):
            settled_options(kind, options.parse, expected, settings)
        with pytest.raises(BadInput, match="did you mean --prompts"):
            settled_options(kind, options.parse, None, {"prompt": "a cat"})
    with pytest.raises(BadInput, match="no model is named"):
        dpo_fast.generate(prompts=["a cat"])


# ---- runs ------------------------------------------------------------------------------------------------------


def process_state() -> dict[str, object]:
    """What a library has no business to change."""
    return {
        "signals": {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)},
        "environment": dict(os.environ),
        "streams": (sys.stdout, sys.stderr, sys.excepthook, sys.unraisablehook),
        "folder": os.getcwd(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "accelerate": [dict(kind._shared_state) for kind in STATES],
        "groups": torch.distributed.is_initialized(),
        "threads": (torch.get_num_threads(), threading.active_count()),
        "generators": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()),
        "dtype": torch.get_default_dtype(),
    }


def test_a_run_is_that_of_the_command_and_leaves_the_process_as_it_was(sdxl_path, pairs, tmp_path):
    assert main(flags_for(sdxl_path, pairs, tmp_path / "command", "--learning_rate", 1e-3)) == 0
    settings = settings_for(sdxl_path, pairs, tmp_path / "python", learning_rate=1e-3, allow_tf32=True)
    before = process_state()
    result = train(**settings)
    assert process_state() == before
    assert_same_state(tmp_path / "command", tmp_path / "python")
    assert result.folder == tmp_path / "python" and result.findings is None and result.stopped is None
    written = json.loads((result.folder / "summary.json").read_text())
    assert result.summary == {name: value for name, value in written.items() if name != "digest"}
    assert f"loss {written['loss_first']:.4f} -> {written['loss_last']:.4f}" in str(result)
    assert (result.folder / "pytorch_lora_weights.safetensors").is_file()
    assert "--learning_rate 0.001" in (result.folder / "README.md").read_text()

    again = train(**settings, resume_from_checkpoint="auto")  # nothing is left to do
    assert again == result
    with pytest.raises(BadInput, match="is not empty; choose another"):
        train(**settings)
    assert process_state() == before


def test_a_run_in_a_thread_beside_an_accelerator_of_the_user_s(sdxl_path, pairs, tmp_path):
    """A notebook's worker: no signal handler can be set there."""
    from accelerate import Accelerator

    before = [{**kind._shared_state} for kind in STATES]
    for kind in STATES:
        kind._shared_state.clear()
    try:
        theirs = Accelerator(mixed_precision="bf16", cpu=True)
        done = []
        settings = settings_for(sdxl_path, pairs, tmp_path / "run", max_train_steps=1)
        thread = threading.Thread(target=lambda: done.append(train(**settings)))
        thread.start()
        thread.join(120)
        assert done and done[0].summary["steps"] == 1
        assert theirs.mixed_precision == "bf16" and theirs.state.num_processes == 1
    finally:
        for kind, state in zip(STATES, before, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(state)


def test_a_recipe_is_overridden_by_settings(sdxl_path, pairs, tmp_path):
    (tmp_path / "r.yaml").write_text("learning_rate: 0.5\nmax_train_steps: 1\n")
    settings = settings_for(sdxl_path, pairs, tmp_path / "run", learning_rate=1e-3)
    del settings["max_train_steps"]
    assert train(tmp_path / "r.yaml", **settings).summary["steps"] == 1
    assert lines(tmp_path / "run")[0]["lr"] == 1e-3


def test_a_signal_raises_once_the_state_is_saved(sdxl_path, pairs, tmp_path):
    class Interrupting(Callback):
        ended = None

        def on_step(self, trainer):
            if trainer.run.step == 2:
                os.kill(os.getpid(), signal.SIGINT)

        def on_end(self, trainer, error):
            self.ended = error

    watch = Interrupting()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"^SIGINT after step 2: saved as .*checkpoint-2; .* auto goes on"):
        train(**settings_for(sdxl_path, pairs, tmp_path / "run"), callbacks=[watch])
    assert signal.getsignal(signal.SIGINT) == before and type(watch.ended) is Interrupted
    result = train(**settings_for(sdxl_path, pairs, tmp_path / "run"), resume_from_checkpoint="auto")
    assert result.summary["steps"] == 4
    train(**settings_for(sdxl_path, pairs, tmp_path / "whole"))
    assert_same_state(tmp_path / "run", tmp_path / "whole")


def penalised(pairs, settings):
    return -torch.nn.functional.logsigmoid(pairs.margin) + 0 * settings.beta


def test_a_loss_from_python_is_recorded_by_name_and_needed_to_go_on(sdxl_path, pairs, tmp_path):
    mine = dpo_fast.Objective(penalised, default_beta=300.0)
    settings = settings_for(sdxl_path, pairs, tmp_path / "run", learning_rate=1e-3)
    train(**settings, objective=mine)
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "\nobjective: python:penalised\n" in config and "\nbeta_dpo: 300.0\n" in config
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "state.json").read_text())
    assert state["config"]["objective"] == "python:penalised"
    card = (tmp_path / "run" / "README.md").read_text()
    assert "python:penalised, beta 300" in card and "was given in Python" in card
    # the same loss from the table gives the same run, up to the rounding of the fused op
    table = train(
        **settings_for(sdxl_path, pairs, tmp_path / "dpo", learning_rate=1e-3), objective="dpo", beta_dpo=300.0
    )
    assert lines(tmp_path / "run")[1]["loss"] == pytest.approx(lines(table.folder)[1]["loss"], rel=1e-3)

    further = settings | {"max_train_steps": 6, "resume_from_checkpoint": "latest"}
    with pytest.raises(BadInput, match="objective: python:penalised -> dpo"):
        train(**further, beta_dpo=300.0)
    again = dict(output_dir=tmp_path / "run", resume_from_checkpoint="latest", max_train_steps=6)
    with pytest.raises(BadInput, match="python:penalised is a function that was given in Python"):
        train(tmp_path / "run" / "config.yaml", **again)
    assert main(["--config", str(tmp_path / "run" / "config.yaml"), "--resume_from_checkpoint", "latest"]) == 2
    with pytest.raises(BadInput, match="objective: python:penalised -> python:other"):
        train(**further, objective=dpo_fast.Objective(penalised, default_beta=300.0, name="other"))
    assert train(**further, objective=mine).summary["steps"] == 6
    config = TrainConfig(**settings | {"output_dir": tmp_path / "object", "learning_rate": 1e-3})
    assert train(config, objective=mine).summary["steps"] == 4
    assert_same_state(tmp_path / "object", tmp_path / "run")


def test_a_loss_that_cannot_be_used_is_refused_before_the_run(sdxl_path, pairs, tmp_path):
    def mean(pairs, settings):
        return pairs.margin.mean()

    with pytest.raises(BadInput, match=r"^the objective mean gives a loss of shape \[\], not \[3\]"):
        train(**settings_for(sdxl_path, pairs, tmp_path / "run"), objective=mean)
    assert not (tmp_path / "run").exists()


def test_a_loss_on_another_scale_does_not_take_a_preset_s_beta():
    mine = dpo_fast.Objective(penalised, default_beta=0.5)
    for config, settings in ((TrainConfig(preset="shapes"), {}), (None, {"preset": "shapes"})):
        with training._resolved(config, mine, settings) as resolved:
            assert (resolved.objective, resolved.beta_dpo) == ("python:penalised", 0.5)
        with training._resolved(config, penalised, settings) as resolved:
            assert resolved.beta_dpo == 2000.0
    with training._resolved(TrainConfig(preset="shapes", beta_dpo=7.0), mine, {}) as resolved:
        assert resolved.beta_dpo == 7.0


def test_a_gpu_that_is_too_small_is_bad_input(sdxl_path, pairs, tmp_path, monkeypatch, capfd):
    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(training.Trainer, "train", full)
    with pytest.raises(BadInput, match=r"^out of GPU memory \(CUDA out of memory\); lower --train_batch_size"):
        train(**settings_for(sdxl_path, pairs, tmp_path / "run"))
    assert main(flags_for(sdxl_path, pairs, tmp_path / "other")) == 2
    assert "dpo_fast: error: out of GPU memory (CUDA out of memory); lower --train_batch_size" in capfd.readouterr().err


def test_an_opened_run_is_held_and_can_be_trained_by_hand(sdxl_path, pairs, tmp_path):
    settings = settings_for(sdxl_path, pairs, tmp_path / "run", learning_rate=1e-3)
    before = process_state()
    with dpo_fast.opened_run(**settings) as run:
        trainer = dpo_fast.Trainer(run)
        first = {name: tensor.clone() for name, tensor in trainer.masters.state()[0]["weights"].items()}
        assert trainer.train_step() and run.step == 1
        assert any(not torch.equal(first[name], now) for name, now in trainer.masters.state()[0]["weights"].items())
        with pytest.raises(BadInput, match="is being written by process"):
            train(**settings, resume_from_checkpoint="auto")
    assert {**process_state(), "threads": None} == {**before, "threads": None}


# ---- pairs -----------------------------------------------------------------------------------------------------


def test_pairs_are_those_that_training_reads(tmp_path):
    labels = [1.0, 0.0, 0.5, 1.0, 0.0, 1.0]
    data = write_pickapic(tmp_path / "pairs.parquet", n=6, labels=labels, captions=["a", "b", "c", "", "e", "f"])
    found = load_pairs(data, max_bad_fraction=0.5)
    assert (len(found), found.rows, found.ties_dropped) == (4, 6, 1)
    assert [(bad.row, bad.column) for bad in found.bad] == [(3, "caption")]
    assert [pair.row for pair in found] == [0, 1, 4, 5] and [pair.caption for pair in found[1:3]] == ["b", "e"]
    assert found[-1].row == 5 and "4 pairs; 1 ties dropped, 1 bad" in str(found)
    with pytest.raises(IndexError):
        found[4]
    table = load_pairs(data, max_bad_fraction=0.5, label_column="none")  # the first is better everywhere
    for pair in found:
        (alike,) = [other for other in table if other.row == pair.row]
        same = (pair.chosen.tobytes(), pair.rejected.tobytes())
        other = (alike.chosen.tobytes(), alike.rejected.tobytes())
        assert same == (other if labels[pair.row] == 1.0 else other[::-1]) and same[0] != same[1]
        assert pair.chosen.mode == "RGB" and pair.label == 1.0
    soft = load_pairs(data, max_bad_fraction=0.5, soft_labels=True)
    assert [pair.label for pair in soft if pair.row == 2] == [0.5] and soft.ties_dropped == 0


def test_pairs_of_a_run_and_its_held_out_ones(sdxl_path, pairs):
    config = TrainConfig(
        pretrained_model_name_or_path=str(sdxl_path), dataset_name=str(pairs), validation_fraction=0.3, seed=5
    )
    found = load_pairs(config)
    trained, held_out = ({pair.row for pair in of} for of in (found, found.validation))
    assert held_out and trained.isdisjoint(held_out) and len(trained) + len(held_out) == found.rows == 12
    assert len(load_pairs(TrainConfig(preset="shapes", preference="appeal"))) > 0
    with pytest.raises(BadInput, match="streaming=False"):
        load_pairs(dataclasses.replace(config, streaming=True))
    with pytest.raises(BadInput, match="soft_labels, seed: give a TrainConfig or settings, not both"):
        load_pairs(config, soft_labels=True, seed=3)
    with pytest.raises(BadInput, match="does not exist"):
        load_pairs("nowhere.parquet")


def test_an_image_that_does_not_decode_says_so_when_it_is_asked_for(tmp_path):
    columns = pickapic(n=3)
    columns["jpg_1"][1] = columns["jpg_1"][1][:200]
    found = load_pairs(write_table(tmp_path / "pairs.parquet", columns), max_bad_fraction=1.0, label_column="none")
    assert [pair.row for pair in found] == [0, 2] and [bad.row for bad in found.bad] == [1]
    late = dataclasses.replace(found[0], row=1)  # as if it had not been in the sample that was decoded at the start
    assert late.chosen.size == (72, 72)
    with pytest.raises(BadInput, match=r"^row 1: jpg_1 .*: leave the pair out"):
        late.rejected  # noqa: B018


# ---- scorers ---------------------------------------------------------------------------------------------------


def pixels_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def test_images_of_every_kind_and_size_get_their_own_scores(tmp_path):
    sizes = [(9, 7), (4, 4), (9, 7), (5, 8), (4, 4), (9, 7)]
    pictures = [Image.fromarray(np.random.randint(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]
    prompts = [f"{number}" for number in range(6)]
    batches = []

    def score(images, texts):
        batches.append((tuple(images.shape), texts))
        return images.double().mean((1, 2, 3)) + 1000 * torch.tensor([float(text) for text in texts])

    path = tmp_path / "a.png"
    pictures[3].save(path)
    arrays = [np.asarray(picture) for picture in pictures]
    images = [pictures[0], arrays[1].copy(), torch.tensor(arrays[2]).permute(2, 0, 1), path, pictures[4], str(path)]
    images[5] = pictures[5]
    expected = [array.mean() + 1000 * number for number, array in enumerate(arrays)]
    found = score_images(images, prompts, Scorer(score), batch_size=2)
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx(expected)
    assert all(shape[0] <= 2 for shape, _ in batches) and len(batches) == 4
    grey = pictures[0].convert("LA")
    see_through = score_images([grey], "0", Scorer(score)).item()
    assert see_through == pytest.approx(pixels_of(grey.convert("L")).mean())
    (mirrored,) = score_images([arrays[0][:, ::-1]], "0", Scorer(lambda images, _: images[:, 0, 0, 0]))
    assert mirrored == arrays[0][0, -1, 0]
    printed = score_images([Image.new("CMYK", (4, 4), (0, 0, 0, 0))], "0", Scorer(score)).item()
    assert printed == 255


def test_what_cannot_be_scored(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.bmp")
    (tmp_path / "cut.bmp").write_bytes((tmp_path / "cut.bmp").read_bytes()[:1000])
    cut = Image.open(tmp_path / "cut.bmp")
    scorer = Scorer(lambda images, texts: torch.full((len(texts),), float("nan")))
    picture = Image.new("RGB", (4, 4))
    for images, prompts, said in (
        ([picture], ["a", "b"], "1 images need as many prompts, not 2"),
        ([picture, np.zeros((4, 4), np.uint8)], "a", r"images\[1\] \(uint8 \[4, 4\]\) is no image"),
        ([np.zeros((4, 4, 3), np.float16)], "a", r"images\[0\] \(float16 \[4, 4, 3\]\) is no image"),
        ([np.array(["a"])], "a", r"images\[0\] \(<U1 \[1\]\) is no image"),
        ([cut], "a", r"images\[0\] of mode RGB cannot be read .*: leave it out, or"),
        ([torch.zeros(3, 4, 4)], "a", r"images\[0\] \(torch.float32 \[3, 4, 4\]\) is no image"),
        ([None], "a", "NoneType"),
        ([picture], "a", r"images\[0\] has no finite score \(nan\)"),
    ):
        with pytest.raises(BadInput, match=said):
            score_images(images, prompts, scorer)
    with pytest.raises(BadInput, match="there is no scorer 'nobody'"):
        score_images([picture], "a", "nobody")
    with pytest.raises(BadInput, match="is loaded already"):
        score_images([picture], "a", scorer, device="cpu")


def test_a_scorer_by_name_judges_the_built_in_world():
    pair = load_pairs(TrainConfig(preset="shapes"))[0]
    by_name = score_images([pair.chosen, pair.rejected], pair.caption, "faithfulness")
    loaded = score_images([pair.chosen, pair.rejected], pair.caption, dpo_fast.load_scorer("faithfulness"))
    assert torch.equal(by_name, loaded) and by_name[0] > by_name[1]
