"""`python -m dpo_fast.cache`: encode images and captions ahead of training, and look after what is kept.

    build FLAGS    encode what `python -m dpo_fast.train FLAGS` will need (without --seed, all of its pairs)
    reference --draws K FLAGS
                   compute the reference's errors that --cached_reference K will need, encoding first what is missing
    info           what the cache holds
    verify         read everything and compare checksums; --remove deletes damaged shards, a build makes them again
    prune          show what may go (--unused_days N, --max_gib N, --name FOLDER ...); --yes deletes it

`build` and `reference` take every flag of training; several GPUs: `accelerate launch -m dpo_fast.cache build FLAGS`.
The others take --latent_cache_dir. Exit status as training's; `verify` ends with 2 where something is damaged.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from dpo_fast.cli import guarded, leave, say, show_log
from dpo_fast.command_line import defaults_of, parse, refuse_empty
from dpo_fast.config import TrainConfig
from dpo_fast.errors import BadInput, printable
from dpo_fast.files import human_bytes, user_path
from dpo_fast.help_text import Page, asks_help, show_help

WHAT = {
    "build": """Encode the images and captions that a run will need, once, and keep them on disk. With --seed and
    --max_train_steps those of the pairs that the run visits, without --seed those of all its pairs. What is there
    already is checked, and only what is missing or damaged is encoded.""",
    "reference": """Compute the errors of the reference that a run with --cached_reference K will need: with
    --max_train_steps those of the pairs that it visits, else those of all its pairs. Images and captions that are
    missing are encoded first.""",
}
# The flags of training that decide what is encoded, or how.
OF_BUILD = frozenset(
    "preset config pretrained_model_name_or_path pretrained_vae_model_name_or_path revision variant single_file_config"
    " is_turbo cache_dir dataset_name dataset_config_name dataset_split_name image_columns label_column preference"
    " caption_column streaming max_train_samples soft_labels max_bad_fraction validation_fraction resolution hflip"
    " init_lora train_batch_size gradient_accumulation_steps pairs_per_step max_train_steps seed mixed_precision"
    " allow_tf32 dataloader_num_workers vae_encode_batch_size latent_cache_dir hub_token".split()
)
# And those that decide the reference's errors.
OF_REFERENCE = OF_BUILD | frozenset(
    "prediction_type zero_terminal_snr min_timestep max_timestep time_ids proportion_empty_prompts objective tuning"
    " run_validation attention memory_order backend prove choices".split()
)
TEXTS = {
    "build": {
        "seed": "That of the run, whose pairs are encoded; None: all pairs are.",
        "max_train_steps": "Optimizer steps of the run, with --seed: the pairs of these steps are encoded; None: all.",
        "dataloader_num_workers": "Threads that read and decode images, at least one.",
    },
    "reference": {
        "seed": "That of the run: the noise of a pair follows from it. Required.",
        "max_train_steps": "Optimizer steps of the run, whose pairs are scored; None: all pairs are.",
        "dataloader_num_workers": "Threads that read and decode images, at least one.",
        "objective": "That of the run, which must be one with a reference; the errors are the same for all of them.",
        "tuning": "lora or full, as in the run; it only changes rounding.",
        "run_validation": "Also score the held-out pairs (--validation_fraction).",
    },
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return guarded(
        lambda: _run(argv),
        argv=argv,
        kept="what was encoded is kept; the same command goes on from there",
        go_on="start the same command again",
    )


def _run(argv: list[str]) -> int:
    if argv[:1] in (["build"], ["reference"]) and asks_help(argv):
        _help(*argv)
    if argv[:1] == ["build"]:
        return _build(argv[1:])
    if argv[:1] == ["reference"]:
        return _reference(argv[1:])
    refuse_empty(argv)
    arguments = _parse(argv)
    from dpo_fast.caching import upkeep
    from dpo_fast.caching.recipe import default_root

    root = user_path(arguments.latent_cache_dir or default_root())
    if arguments.command == "verify":
        return _verify(upkeep, root, arguments.remove)
    found = upkeep.entries(root)
    if arguments.command == "prune":
        return _prune(upkeep, root, found, arguments)
    print(f"{root}: {human_bytes(sum(entry.bytes for entry in found))}")
    for entry in found:
        print(_line(entry))
    return 0


def _build(argv: list[str]) -> int:
    counts, seconds = _on_ranks("build_cache", argv)
    say(
        f"images: {counts.image_uses} of {counts.image_uses // 2} pairs are {counts.images} different ones,"
        f" {counts.images_encoded} encoded now"
    )
    say(f"captions: {counts.captions} are {counts.prompts} different ones, {counts.prompts_encoded} encoded now")
    say(f"the cache is complete, after {seconds:.0f} s")
    return 0


def _reference(argv: list[str]) -> int:
    draws = [f"--cached_reference{word.removeprefix('--draws')}" if _is_draws(word) else word for word in argv]
    scored, seconds = _on_ranks("build_reference", draws)
    pairs = scored.pair_draws // scored.errors.draws
    say(
        f"reference errors: {pairs} pairs at {scored.errors.draws} draws, {scored.scored_now} of {scored.pair_draws}"
        f" computed now, after {seconds:.0f} s"
    )
    return 0


def _help(command: str, *flags: str) -> NoReturn:
    """Print the flags that `build` or `reference` heeds, with the defaults of the preset that is named, and exit."""
    page = Page(
        prog=f"python -m dpo_fast.cache {command}",
        flags=TrainConfig,
        what=WHAT[command],
        about="""All flags of `python -m dpo_fast.train` except --dry_run are accepted, so that a command line can be
        taken from there. Those below decide what is made, and how; the others change nothing here.""",
        usage="[--FLAG VALUE ...]" if command == "build" else "--draws K --seed N [--FLAG VALUE ...]",
        only=OF_BUILD if command == "build" else OF_REFERENCE,
        own={} if command == "build" else {"draws": ("INT", "Draws a pair: the K of --cached_reference K. Required.")},
        texts=TEXTS[command],
    )
    show_help(page, *defaults_of([word for word in flags if not _is_draws(word)]))


def _on_ranks(build: str, argv: list[str]) -> tuple[Any, float]:
    """What that function of `training.run` makes of the run with the flags `argv`, and the seconds that it took."""
    config, notes = parse([*argv, "--cache"])
    for note in notes:
        say(note)
    if config.dry_run:
        raise BadInput(
            "--dry-run is for `python -m dpo_fast.train`, which says what the cache lacks: leave it out here"
        )
    from dpo_fast import parallel  # seconds, which flags that cannot be used must not cost
    from dpo_fast.training import run

    show_log()
    started = time.perf_counter()
    with parallel.joined("none") as ranks:
        return getattr(run, build)(config, ranks), time.perf_counter() - started


def _is_draws(word: str) -> bool:
    return word.split("=")[0] == "--draws"


def _verify(upkeep, root: Path, remove: bool) -> int:
    looked, damaged = 0, 0
    for path, fault in upkeep.verify(root, remove=remove):
        looked += 1
        if fault:
            damaged += 1
            print(f"{path}: {fault}" + (" (removed)" if remove else ""))
    print(f"{root}: {looked} shards, {damaged} damaged")
    if damaged and not remove:
        raise BadInput(
            f"{damaged} of {looked} shards are damaged: `verify --remove` deletes them, a build makes them again"
        )
    return 0


def _prune(upkeep, root: Path, found: list, arguments: argparse.Namespace) -> int:
    going = upkeep.to_prune(found, unused_days=arguments.unused_days, names=arguments.name, max_gib=arguments.max_gib)
    for entry in going:
        if arguments.yes:
            upkeep.delete(entry)
        print(("deleted    " if arguments.yes else "would go   ") + _line(entry))
    size = human_bytes(sum(entry.bytes for entry in going))
    print(f"{root}: {size} in {len(going)} folders {'deleted' if arguments.yes else 'would go; --yes deletes them'}")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise BadInput(f"{message}; --help lists the commands")


def _parse(argv: list[str]) -> argparse.Namespace:
    shape = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="python -m dpo_fast.cache", description=__doc__, formatter_class=shape)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="encode what a run will need", add_help=False)
    commands.add_parser("reference", help="compute the reference's errors for --cached_reference", add_help=False)
    for name, help_ in (("info", "what the cache holds"), ("verify", "compare checksums"), ("prune", "delete entries")):
        command = commands.add_parser(name, help=help_)
        command.add_argument("--latent_cache_dir", type=Path, help="the cache folder; left out: the default one")
        if name == "verify":
            command.add_argument("--remove", action="store_true", help="delete damaged shards")
        if name == "prune":
            command.add_argument("--unused_days", type=float, help="folders not used for more than N days")
            command.add_argument("--max_gib", type=float, help="the longest unused, until the rest is this small")
            command.add_argument("--name", nargs="+", default=[], help="folders by name")
            command.add_argument("--yes", action="store_true", help="delete, not only show")
    return parser.parse_args(argv)


def _line(entry) -> str:
    days = (time.time() - entry.used) / 86400
    items = f"{entry.items} entries" if entry.items else "row index"
    return printable(
        f"{entry.folder.name}  {human_bytes(entry.bytes)}  {items}  used {days:.1f} days ago  {entry.about}"
    )


if __name__ == "__main__":
    leave(main())
