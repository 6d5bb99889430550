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
from typing import Any

from dpo_fast.cli import guarded, leave, say, show_log
from dpo_fast.command_line import parse, refuse_empty
from dpo_fast.errors import BadInput, printable
from dpo_fast.files import human_bytes, user_path


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return guarded(
        lambda: _run(argv),
        kept="what was encoded is kept; the same command goes on from there",
        go_on="start the same command again",
    )


def _run(argv: list[str]) -> int:
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
    ranks = parallel.start("none")
    started = time.perf_counter()
    try:
        return getattr(run, build)(config, ranks), time.perf_counter() - started
    finally:
        ranks.close()


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
