"""`python -m dpo_fast.vote`: people compare images blindly on a page that this command serves.

    vote FOLDER ... [--FLAG VALUE ...]   serve until Ctrl-C; the same command goes on
    vote results FILE [--json]           what the votes of a file say; --picture FILE.png: drawn
    vote export FILE --to votes.csv      the votes, one a row
    vote export FILE --to pairs.parquet  pairs of images to train on, labelled by the votes

Exit status: 0 done, also after Ctrl-C while serving, 2 bad input, 130 interrupted before that, 1 an internal error.
"""

import json
import sys
from pathlib import Path

from dpo_fast.cli import guarded, leave, say, show, show_log
from dpo_fast.errors import BadInput, missing_extra
from dpo_fast.files import user_path
from dpo_fast.help_text import HELP


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {"results": _results, "export": _export}
    command = commands.get(argv[0]) if argv else None
    return guarded(
        lambda: command(argv[1:]) if command is not None else _serve(argv),
        argv=argv,
        kept="votes are kept; the same command goes on",
        go_on="start the same command again",
    )


def _serve(argv: list[str]) -> int:
    from dpo_fast.voting.options import parse  # needs numpy, which `--version` and the list of commands must not load

    config = parse(argv)
    for package in ("fastapi", "uvicorn"):
        try:
            __import__(package)
        except ImportError:
            raise missing_extra(package, "vote", "python -m dpo_fast.vote") from None
    from dpo_fast.voting.serve import serve  # seconds, which flags that cannot be used must not cost

    show_log()
    session = serve(config)
    try:
        path, number = session.store.path, len(session.store.votes(excluded=True))
        show(f"\n{number:,} votes are in {path}")
        if number:
            show(_table(path))
    finally:
        session.close()
    _show_reports(path)
    say(f"go on: python -m dpo_fast.vote --votes_file {path}; results: python -m dpo_fast.vote results {path}")
    return 0


def _results(argv: list[str]) -> int:
    if any(word in HELP for word in argv):
        print(
            "usage: python -m dpo_fast.vote results FILE [--json] [--picture FILE.png]\n\n"
            "print what votes say; --json: all of it; --picture: also draw win rates and strengths with intervals"
        )
        return 0
    words = [word for word in argv if word != "--json"]
    picture = None
    if "--picture" in words:
        place = words.index("--picture")
        if place + 1 == len(words) or not words[place + 1].endswith(".png"):
            raise BadInput("--picture needs the file to draw, a .png")
        picture = user_path(Path(words[place + 1]))
        del words[place : place + 2]
    if unknown := next((word for word in words if word.startswith("-")), None):
        raise BadInput(f"{unknown} is no flag of `vote results`: it takes a file, --json and --picture FILE.png")
    if len(words) != 1:
        raise BadInput("`vote results` takes one file of votes: name votes.sqlite")
    from dpo_fast.voting.summaries import summary_of_file

    path = user_path(Path(words[0]))
    summary = summary_of_file(path)
    if picture is not None:
        from dpo_fast.votes.picture import save_picture

        save_picture(summary, picture)
    if "--json" in argv:
        show(json.dumps(summary, indent=2, ensure_ascii=False))
        return 0
    from dpo_fast.votes.tally import as_text

    show(as_text(summary))
    _show_reports(path)
    return 0


def _show_reports(path: Path) -> None:
    """Write the reports again that show these votes: of the evaluation, run or protocol in whose folder the file is."""
    from dpo_fast.evaluation.protocol_table import show_votes

    try:
        said = show_votes(path)
    except BadInput as error:  # votes are kept, and read, whatever became of the images
        say(f"the report that shows these votes is not written again: {error}")
        return
    if said:
        show(f"\n{said}")


def _export(argv: list[str]) -> int:
    from dpo_fast.voting.export import export, parse

    show(str(export(parse(argv))))
    return 0


def _table(path: Path) -> str:
    from dpo_fast.votes.tally import as_text
    from dpo_fast.voting.summaries import summary_of_file

    return as_text(summary_of_file(path))


if __name__ == "__main__":
    leave(main())
