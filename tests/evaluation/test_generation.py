"""Images on disk from a policy and its baseline: the same noise, any batch, any number of processes, gone on with."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dpo_fast.errors import BadInput
from dpo_fast.evaluation.generate_options import seeds_of
from dpo_fast.evaluation.generation import ImageRequest, ImageRow, noise_seed, read_layouts, settings_of_images
from dpo_fast.evaluation.image_names import file_stem
from dpo_fast.evaluation.prompts import Prompt
from dpo_fast.evaluation.sides import model_sources, read_run
from dpo_fast.generate import main
from dpo_fast.models import merge_lora
from dpo_fast.models.opened import OneAtATime, settled
from dpo_fast.models.sampling import sample
from dpo_fast.models.source import base_of, result_of
from dpo_fast.pictures import to_picture
from dpo_fast.shapes import base as shapes_base
from tests.helpers.pipelines import load_model
from tests.helpers.runs import start, train
from tests.runs.test_distributed import TORCHRUN

TEXTS = ("a cat on a mat", "a Dog!", "a red hat")
CPU = torch.device("cpu")


def rows_of(out: Path, model: str | None = None) -> list[ImageRow]:
    """What images.json lists."""
    rows = [ImageRow(**row) for row in json.loads((out / "images.json").read_text())["images"]]
    return [row for row in rows if model in (None, row.model)]


def is_whole(out: Path) -> bool:
    return json.loads((out / "images.json").read_text())["complete"]


@pytest.fixture
def generate(tmp_path, capfd):
    """Run the command into `tmp_path/out`, or into the folder that is named; returns the folder."""

    def run(policy: Path, *flags: object, out: str = "out", prompts: tuple[str, ...] = TEXTS, status: int = 0) -> Path:
        argv = ["--policy", policy, "--prompts", *prompts, "--output_dir", tmp_path / out]
        argv += ["--sampling_steps", 2, "--resolution", 64] if "--sampling_steps" not in flags else []
        assert main([str(word) for word in (*argv, *flags)]) == status
        return tmp_path / out

    return run


@pytest.fixture(scope="session")
def moved(sdxl_path, pairs, tmp_path_factory) -> Path:
    """A LoRA run whose result differs from its base."""
    return train(sdxl_path, pairs, tmp_path_factory.mktemp("runs") / "moved", "--learning_rate", 1e-2)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.png"))}


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


# ---- the models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, more", [("sd15", []), ("sdxl", []), ("turbo", ["--is_turbo"])])
def test_a_lora_that_changes_nothing_gives_the_images_of_its_base(
    request, pairs, tmp_path, generate, name, more, capfd
):
    run = train(request.getfixturevalue(f"{name}_path"), pairs, tmp_path / "run", "--learning_rate", 1e-30, *more)
    out = generate(run, "--seeds", 2)
    said = capfd.readouterr()
    assert "12 images of 3 prompts, 12 made now" in said.out and "2 steps" in said.err
    names = [f"{file_stem(text)}-{seed}.png" for text in TEXTS for seed in (0, 1)]
    assert sorted(p.name for p in (out / "base").iterdir()) == sorted(p.name for p in (out / "run").iterdir())
    assert [row.file for row in rows_of(out, "run")] == [f"run/{name}" for name in names]
    for file in names:
        assert np.array_equal(pixels(out / "base" / file), pixels(out / "run" / file))
    different = {pixels(out / "base" / file).tobytes() for file in names}
    assert len(different) == 6


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_run_that_moved_is_sampled_as_diffusers_does(sd15_path, pairs, tmp_path, generate, tuning):
    flags = ["--tuning", tuning, "--learning_rate", 1e-2]
    run = train(sd15_path, pairs, tmp_path / "run", *flags)
    out = generate(run, "--baseline", "base")
    policy = load_model(run if tuning == "full" else sd15_path, dtype=torch.float32, device=CPU)
    if tuning == "lora":
        policy.pipeline.load_lora_weights(run, weight_name="pytorch_lora_weights.safetensors")
    policy.pipeline.set_progress_bar_config(disable=True)
    for row in rows_of(out, "run"):
        ours = pixels(out / row.file)
        theirs = policy.pipeline(
            row.prompt, num_inference_steps=2, height=64, width=64, generator=torch.manual_seed(row.noise_seed)
        )
        assert np.abs(ours - np.asarray(theirs.images[0]).astype(int)).max() <= 1  # rounding
        assert np.abs(ours - pixels(out / row.file.replace("run/", "base/"))).max() > 5


def test_the_base_of_a_run_has_its_first_lora_merged(sdxl_path, pairs, tmp_path, moved, generate):
    run = train(sdxl_path, pairs, tmp_path / "run", "--init_lora", moved, "--learning_rate", 1e-30)
    out = generate(run, "--seeds", "7,", prompts=TEXTS[:1])
    family = load_model(sdxl_path, dtype=torch.float32, device=CPU)
    merge_lora(family.pipeline, moved)
    (expected,) = sample(family, [TEXTS[0]], [noise_seed(TEXTS[0], 7)], resolution=64, steps=2)
    for name in ("base", "run"):
        found = pixels(out / name / f"{file_stem(TEXTS[0])}-7.png")
        assert np.abs(found - np.asarray(to_picture(expected)).astype(int)).max() <= 1
    bare = sample(load_model(sdxl_path, dtype=torch.float32, device=CPU), [TEXTS[0]], [7], resolution=64, steps=2)
    assert not torch.equal(bare[0], expected)


def test_how_models_are_named_and_sampled(sd15_path, sdxl_path, turbo_path, moved, tmp_path):
    one = model_sources(str(sd15_path))
    assert list(one) == [sd15_path.name]
    usual = [(m.steps, m.guidance, m.resolution) for m in (one[sd15_path.name],)]
    usual += [(m.steps, m.guidance, m.resolution) for m in model_sources(str(sdxl_path)).values()]
    usual += [(m.steps, m.guidance, m.resolution) for m in model_sources(str(turbo_path), turbo=True).values()]
    assert usual == [(50, 7.5, 64), (50, 5.0, 64), (4, 0.0, 64)]
    base, policy = model_sources(str(moved)).items()
    assert (base[0], policy[0]) == ("base", moved.name) and policy[1] == replace(base[1], adapter=str(moved))
    assert list(model_sources(str(moved), "none")) == [moved.name]
    # one of the policy's family is sampled as the policy is, another as it usually is
    same, _ = model_sources(str(moved), str(sdxl_path), steps=7).values()
    assert (same.steps, same.guidance, same.path) == (7, 5.0, str(sdxl_path))
    config = replace(read_run(str(moved)), sampling_steps=10, sampling_guidance=3.0)
    assert settled(result_of(config, moved)).steps == 10 and settled(base_of(config)).guidance == 3.0
    twin = shutil.copytree(moved, tmp_path / moved.name)
    assert list(model_sources(str(moved), str(twin))) == [f"baseline-{moved.name}", moved.name]
    with pytest.raises(BadInput, match="needs a run as --policy"):
        model_sources(str(sd15_path), "base")
    (twin / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(BadInput, match="has no result yet"):
        model_sources(str(twin))
    with pytest.raises(BadInput, match=r"--resolution \(60\) must be a multiple of 16"):
        model_sources(str(sd15_path), resolution=60)


def test_one_model_is_held_and_a_lora_only_put_on(sdxl_path, moved, monkeypatch):
    loaded = []
    monkeypatch.setattr(OneAtATime, "_load", lambda self, source: loaded.append(source) or original(self, source))
    models = OneAtATime(CPU)
    base, policy = model_sources(str(moved)).values()
    first = models.open(base)
    assert models.open(policy) is first and models.open(policy) is first and loaded == [base]
    assert first.pipeline.get_active_adapters()
    assert models.open(base) is not first and len(loaded) == 2  # the LoRA is on the one that was held


original = OneAtATime._load


# ---- batches, processes, interruptions -----------------------------------------------------------------------------


def test_a_batch_changes_rounding_only(sdxl_path, generate):
    one = generate(sdxl_path, "--seeds", 2, "--batch_size", 1, out="one")
    four = generate(sdxl_path, "--seeds", 2, "--batch_size", 4, out="four")
    files = sorted(contents(one))
    assert files == sorted(contents(four)) and len(files) == 7
    for file in files[1:]:
        assert np.abs(pixels(one / file) - pixels(four / file)).max() <= 1


def test_weights_that_changed_are_refused_though_nothing_is_missing(moved, tmp_path, generate, capfd):
    run = shutil.copytree(moved, tmp_path / "run")
    out = generate(run)
    (run / "config.yaml").touch()
    os.utime(run / "pytorch_lora_weights.safetensors")  # the same weights
    generate(run)
    lora = load_file(run / "pytorch_lora_weights.safetensors")
    save_file({name: -3 * tensor for name, tensor in lora.items()}, run / "pytorch_lora_weights.safetensors")
    before = contents(out)
    generate(run, status=2)
    assert "pytorch_lora_weights.safetensors is not what the run wrote" in capfd.readouterr().err
    (run / "summary.json").unlink()  # the change is meant
    generate(run, status=2)
    assert "are not those that its images come from" in capfd.readouterr().err and contents(out) == before


def test_what_is_missing_is_made_again_to_the_byte(moved, generate, capfd, monkeypatch):
    flags = ("--seeds", "3,17", "--batch_size", 4)
    out = generate(moved, *flags)
    before = contents(out)
    listing = (out / "images.json").read_bytes()
    gone = [f"base/{file_stem(TEXTS[1])}-17.png", f"moved/{file_stem(TEXTS[0])}-3.png", "grid.png"]
    for file in gone:
        (out / file).unlink()
    (out / "moved" / ".tmp-killed.png").write_bytes(b"half")
    kept = {file: (out / file).stat().st_mtime_ns for file in before if file not in gone}
    capfd.readouterr()
    assert generate(moved, *flags) == out
    assert "12 images of 3 prompts, 2 made now" in capfd.readouterr().out
    assert contents(out) == before and (out / "images.json").read_bytes() == listing
    assert {file: (out / file).stat().st_mtime_ns for file in kept} == kept
    monkeypatch.setattr(OneAtATime, "_load", lambda *_: pytest.fail("nothing is missing, but a model was loaded"))
    generate(moved, *flags)
    assert "0 made now" in capfd.readouterr().out


def test_interrupted_images_are_gone_on_with(sdxl_path, tmp_path, generate, monkeypatch, capfd):
    whole = contents(generate(sdxl_path, "--batch_size", 1, out="whole"))
    from dpo_fast.evaluation import generation

    count = iter(range(9))

    def stop_at_the_third(*arguments, **more):
        if next(count) == 2:
            raise KeyboardInterrupt
        return sample(*arguments, **more)

    monkeypatch.setattr(generation, "sample", stop_at_the_third)
    out = generate(sdxl_path, "--batch_size", 1, status=130)
    assert "go" in capfd.readouterr().err and not is_whole(out)
    assert len(contents(out)) == 2
    monkeypatch.undo()
    assert contents(generate(sdxl_path, "--batch_size", 1)) == whole and is_whole(out)


@pytest.mark.exhaustive
def test_two_processes_make_the_images_of_one(moved, tmp_path, generate):
    flags = ("--seeds", 3, "--batch_size", 2)
    one = generate(moved, *flags, out="one")
    argv = ["--policy", moved, "--prompts", *TEXTS, "--sampling_steps", 2, "--resolution", 64, *flags]
    process = start(*argv, "--output_dir", tmp_path / "two", launcher=TORCHRUN, program="generate")
    printed, error = process.communicate(timeout=180)
    assert process.returncode == 0, error
    assert printed.count("18 images of 3 prompts, 18 made now") == 1
    assert contents(tmp_path / "two") == contents(one)
    assert (tmp_path / "two" / "images.json").read_bytes() == (one / "images.json").read_bytes()


# ---- the folder ----------------------------------------------------------------------------------------------------


def test_other_settings_and_other_files_are_refused(sdxl_path, sd15_path, tmp_path, generate, capfd):
    model = shutil.copytree(sdxl_path, tmp_path / "model")
    out = generate(model)
    before = contents(out)

    def refused(*flags: object, policy: Path = model, **more) -> str:
        capfd.readouterr()
        generate(policy, *flags, status=2, **more)
        (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
        return line

    assert "models model steps: 2 before, 3 now" in refused("--sampling_steps", 3)
    assert "seeds: [0] before, [0, 1] now" in refused("--seeds", 2)
    assert "prompts: 3 of" in refused(prompts=(*TEXTS, "a fourth one"))
    assert "models sd15" in refused(policy=sd15_path)
    spoil(model)
    (out / "model" / f"{file_stem(TEXTS[0])}-0.png").unlink()
    assert "the weights of model" in refused()
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.tex").write_text("mine")
    assert "is not empty and holds no images.json" in refused(out="else")
    (tmp_path / "else" / "images.json").write_text("{}")
    assert "images.json cannot be read or is damaged" in refused(out="else")
    del before[f"model/{file_stem(TEXTS[0])}-0.png"]
    assert contents(out) == before


def test_the_schedule_that_was_trained_decides_the_images(sdxl_path, generate):
    """But a listing of a time when samplers did not follow it is gone on with."""
    model = model_sources(str(sdxl_path), steps=2, resolution=64)["sdxl"]
    wanted = ImageRequest({"sdxl": model}, [Prompt("a cat", "text")], [0])
    plain = settings_of_images(wanted, CPU)
    assert "zero_terminal_snr" not in plain["models"]["sdxl"]
    trained = replace(model, zero_terminal_snr="on", prediction_type="v_prediction")
    assert (
        settings_of_images(replace(wanted, models={"sdxl": trained}), CPU)["models"]["sdxl"]["zero_terminal_snr"]
        == "on"
    )
    config = OneAtATime(CPU).open(trained).pipeline.scheduler.config
    assert (config.rescale_betas_zero_snr, config.timestep_spacing) == (True, "trailing")


def spoil(model: Path) -> None:
    """Other weights in the same files."""
    from safetensors.torch import load_file, save_file

    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_in.bias"] += 1
    save_file(state, file, metadata={"format": "pt"})


def test_an_image_says_what_made_it(sdxl_path, tmp_path, generate):
    table = tmp_path / "p.tsv"
    table.write_text("Prompt\tCategory\tChallenge\tNote\na cat — 雪\tAnimals\tBasic\t\na cat — 雪\tArts\tBasic\t\n")
    out = generate(sdxl_path, "--seeds", "5,", prompts=(str(table), "a dog there"))
    one, again, other = rows_of(out)
    assert one.file == again.file and (one.category, again.category) == ("Animals", "Arts")
    assert len(contents(out)) == 3  # with the grid
    with Image.open(out / one.file) as image:
        texts = image.text
    noise = str(noise_seed("a cat — 雪", 5))
    assert texts["prompt"] == "a cat — 雪" and texts["category"] == "Animals" and texts["challenge"] == "Basic"
    assert (texts["seed"], texts["noise_seed"], texts["model"]) == ("5", noise, sdxl_path.name)
    assert (texts["steps"], texts["guidance"], texts["sampler"]) == ("2", "5", "EulerDiscreteScheduler")
    assert (texts["weights"], texts["resolution"], texts["dtype"]) == (sdxl_path.name, "64", "float32")
    assert f"torch {torch.__version__}" in texts["versions"] and "strength" not in texts
    with Image.open(out / other.file) as image:
        assert "category" not in image.text and image.text["source"] == "text"


def test_the_grid_shows_a_column_a_prompt(moved, generate):
    out = generate(moved, "--seeds", 2)
    grid = pixels(out / "grid.png")
    assert grid.shape[1] == 8 + 3 * (160 + 8)
    for row, name in enumerate(("base", "moved")):
        for column, text in enumerate(TEXTS):
            with Image.open(out / name / f"{file_stem(text)}-0.png") as image:
                cell = np.asarray(image.convert("RGB").resize((160, 160), Image.Resampling.NEAREST)).astype(int)
            y, x = 8 + row * (160 + 20 + 8) + 20, 8 + column * 168
            assert np.array_equal(grid[y : y + 160, x : x + 160], cell)


def test_names_of_files():
    stems = [file_stem(text) for text in ("a cat", "A cat", "a  cat", "a-cat", "雪", "ф", "w " * 200, "w " * 201)]
    assert stems[0] == "a-cat" and len(set(stems)) == len(stems)
    assert all(stem.startswith("a-cat-") for stem in stems[1:4]) and stems[4].startswith("prompt-")
    assert max(map(len, stems)) < 100


# ---- layouts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def layouts(tmp_path, seed) -> Path:
    folder = tmp_path / "layouts"
    folder.mkdir()
    random = np.random.default_rng(seed)
    for name in ("a-dog", "b", "Red_Hat, A!"):
        block = random.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(block).resize((80, 60), Image.Resampling.NEAREST).save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_a_prompt_takes_the_layout_of_its_name_and_the_others_take_turns(layouts):
    shutil.copy(layouts / "b.png", layouts / "a red hat.PNG")
    prompts = [Prompt(text, "text") for text in ("A RED HAT", "one", "two", "a dog", "three", "four", "five", "one")]
    chosen = {text: layout.path.name for text, layout in read_layouts(layouts, prompts).items()}
    files = ["Red_Hat, A!.png", "a red hat.PNG", "a-dog.png", "b.png"]
    assert chosen == {
        "A RED HAT": files[1],
        "a dog": files[2],
        **{text: files[k % 4] for k, text in enumerate(("one", "two", "three", "four", "five"))},
    }
    assert {layout.path.name for layout in read_layouts(layouts / "b.png", prompts).values()} == {"b.png"}


@pytest.mark.parametrize("name, more", [("sd15", []), ("sdxl", []), ("turbo", ["--is_turbo"])])
def test_sdedit_starts_from_the_layout(request, generate, layouts, name, more):
    path = request.getfixturevalue(f"{name}_path")
    steps = ["--sampling_steps", 10, "--resolution", 64]
    family = load_model(path, turbo=name == "turbo", dtype=torch.float32, device=CPU)
    (layout,) = {layout for layout in read_layouts(layouts / "b.png", [Prompt("x", "")]).values()}
    there_and_back = family.decode_latents(family.encode_images(layout.pixels(64)[None]))[0]
    target = np.asarray(to_picture(there_and_back)).astype(int)
    distances, images = [], []
    for strength in (0.1, 0.6, 1.0):
        flags = ("--layout", layouts / "b.png", "--strength", strength, *more, *steps)
        out = generate(path, *flags, out=f"{strength}", prompts=TEXTS[:1])
        (row,) = rows_of(out)
        images.append(pixels(out / row.file))
        distances.append(np.abs(images[-1] - target).mean())
        with Image.open(out / row.file) as image:
            assert image.text["strength"] == str(strength) and image.text["layout"] == row.layout == "b.png"
    assert not np.array_equal(images[0], images[1]) and not np.array_equal(images[1], images[2])
    assert distances[0] < distances[2]
    assert pixels(out / "grid.png").shape[0] > 2 * 160  # the layout stands above


def test_little_noise_stays_near_the_layout(generate, tmp_path):
    """In the built-in world, whose encoder is exact."""
    scene = tmp_path / "scene.png"
    block = np.zeros((16, 16, 3), np.uint8)
    block[4:12, 4:12] = (217, 38, 38)
    Image.fromarray(block).save(scene)
    model = Path(shapes_base.__file__).parent / "pipeline"
    caption = "a red square on a white background, large, at the centre"
    errors = []
    for strength in (0.02, 0.6):
        flags = ("--layout", scene, "--strength", strength, "--sampling_steps", 50, "--sampling_guidance", 1)
        out = generate(model, *flags, out=f"{strength}", prompts=(caption,))
        errors.append(np.abs(pixels(out / rows_of(out)[0].file) - block).mean())
    assert errors[0] < 6 and errors[1] > 30  # of 255


def test_the_noise_on_a_layout_is_the_schedules(sd15_path, monkeypatch):
    """As diffusers' image-to-image pipeline has it, given the latents and the same generator."""
    from diffusers import StableDiffusionImg2ImgPipeline

    family = load_model(sd15_path, dtype=torch.float32, device=CPU)
    layouts = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    ours = sample(family, ["a cat", "a dog"], [3, 4], resolution=64, steps=10, layouts=layouts, strength=0.45).int()
    theirs = StableDiffusionImg2ImgPipeline(**family.pipeline.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    for row, prompt in enumerate(("a cat", "a dog")):
        latents = theirs(
            prompt,
            image=family.encode_images(layouts[row : row + 1]).float(),
            strength=0.45,
            num_inference_steps=10,
            guidance_scale=7.5,
            generator=torch.Generator().manual_seed(3 + row),
            output_type="latent",
        ).images
        assert (family.decode_latents(latents)[0].int() - ours[row]).abs().max() <= 1


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--seeds", "0"], "--seeds (0) must be 1 to 10000"),
        (["--seeds", "-3"], "--seeds (-3)"),
        (["--seeds", "1,1"], "once"),
        (["--seeds", "many"], "--seeds (many)"),
        (["--strength", "0", "--layout", "l.png"], "--strength (0.0) must be in (0, 1]"),
        (["--strength", "1.5", "--layout", "l.png"], "--strength (1.5)"),
        (["--strength", "0.5"], "add --layout"),
        (["--layout", "nowhere.png"], "nowhere.png does not exist"),
        (["--layout", "l.png"], "l.png cannot be decoded"),
        (["--layout", "empty"], "holds no image"),
        (["--layout", "good.png", "--strength", "0.2", "--sampling_steps", "4"], "less than one step"),
        (["--prompts", "drawbench"], "is no set"),
        (["--prompts", "empty.txt"], "holds no prompt"),
        (["--policy", "nowhere/at/all"], "nowhere/at/all"),
        (["--baseline", "base"], "needs a run"),
        (["--baseline", "nowhere/at/all"], "nowhere/at/all"),
        (["--batch_size", "0"], "--batch_size (0)"),
        (["--sampling_guidance", "nan"], "--sampling_guidance (nan)"),
        (["--resolution", "60"], "must be a multiple of 16"),
        (["--step", "3"], "did you mean --sampling_steps"),
        (["--max_prompts", "0"], "--max_prompts (0)"),
    ],
)
def test_bad_input_is_found_before_a_model_is_loaded(sd15_path, tmp_path, monkeypatch, capfd, flags, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(OneAtATime, "_load", lambda *_: pytest.fail("a model was loaded"))
    Path("empty.txt").write_text("\n")
    Path("l.png").write_bytes(b"\x89PNG not at all")
    Path("empty").mkdir()
    Image.new("RGB", (8, 8)).save("good.png")
    given = ["--policy", str(sd15_path), "--output_dir", "out"] + ([] if "--prompts" in flags else ["--prompts", "a b"])
    assert main([*given, *flags]) == 2
    (line,) = capfd.readouterr().err.splitlines()[-1:]
    assert line.startswith("dpo_fast: error: ") and said in line
    assert not Path("out").exists()


def test_repeated_prompts_add_up(sd15_path, tmp_path, generate):
    out = generate(sd15_path, "--prompts=a third one", "--prompts", "a fourth one", "--seeds", "1")
    assert [row.prompt for row in rows_of(out)] == [*TEXTS, "a third one", "a fourth one"]


def test_seeds():
    assert seeds_of("3") == (0, 1, 2) and seeds_of("7,") == (7,) and seeds_of("3, 17") == (3, 17)


def test_noise_differs_between_prompts_and_seeds():
    numbers = {noise_seed(text, seed) for text in TEXTS for seed in range(10)}
    assert len(numbers) == 30 and all(0 <= number < 2**63 for number in numbers)
