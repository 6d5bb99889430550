"""Makes the two pictures of the README from a run: docs/samples.png and docs/report.png.

    python -m dpo_fast.train --output_dir RUN && python -m benchmarks.pictures RUN

samples.png is the run's own sheet, report.png the top of its report.html in a headless Chromium or Chrome, in light
colours. Both are made before either is written. Exit status: 0 done, 2 where RUN or the browser cannot be used.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from dpo_fast.errors import BadInput
from dpo_fast.pictures import save_png

DOCS = Path(__file__).parents[1] / "docs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
WIDTH, HEIGHT = 1100, 1290  # pixels of the page that are shown: down to the chart of win rates
PATIENCE = 120  # seconds for the browser


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="the output folder of a run that was evaluated")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the pictures are written")
    parser.add_argument("--browser", help=f"the browser's command; left out: the first of {', '.join(BROWSERS)}")
    parser.add_argument("--height", type=int, default=HEIGHT, help="how much of the page is shown, pixels")
    arguments = parser.parse_args()
    try:
        sheet = picture(arguments.run / "samples.png")
        page = screenshot(arguments.run / "report.html", browser(arguments.browser), arguments.height)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    for image, name in ((sheet, "samples.png"), (page, "report.png")):
        save_png(image, arguments.docs / name)
        print(arguments.docs / name)
    return 0


def browser(command: str | None) -> str:
    """Return the browser's path. Raises BadInput if there is none."""
    for name in BROWSERS if command is None else (command,):
        if (path := shutil.which(name)) is not None:
            return path
    raise BadInput(
        f"no browser {command or 'called ' + ', '.join(BROWSERS)}: install one (on Debian or Ubuntu the package"
        " chromium), or name it with --browser"
    )


def screenshot(page: Path, command: str, height: int) -> Image.Image:
    """Return the top of a page as a headless browser shows it. Raises BadInput if that fails."""
    if not page.is_file():
        raise BadInput(f"{page} does not exist: name the folder of a run that was evaluated (--eval_scorers)")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "page.png")
        flags = ["--headless", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"]
        # its sandbox needs rights that containers often lack; the page is ours, and loads nothing
        flags += ["--no-sandbox", f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{height}"]
        try:
            ran = subprocess.run(
                [command, *flags, f"--screenshot={out}", page.resolve().as_uri()],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PATIENCE,
            )
        except subprocess.TimeoutExpired as error:
            raise BadInput(f"{command} made no picture within {PATIENCE} s: name another with --browser") from error
        if not out.is_file():
            said = (ran.stderr.strip().splitlines() or ["without a word"])[-1]
            raise BadInput(f"{command} made no picture, exit status {ran.returncode}: {said}")
        return picture(out)


def picture(file: Path) -> Image.Image:
    """Open a picture, read as a whole. Raises BadInput if that fails."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except OSError as error:
        raise BadInput(f"{file} cannot be read ({error}): name the folder of a run that was evaluated") from error


if __name__ == "__main__":
    sys.exit(main())
