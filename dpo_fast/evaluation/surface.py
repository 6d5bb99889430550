"""A picture of what a grid of checkpoints and strengths scores."""

from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from dpo_fast.evaluation.picking import Point, Row

CELL = 150, 74  # pixels
LEFT, TOP, BOTTOM, RIGHT = 110, 84, 96, 20
WORSE, EVEN, BETTER = (178, 84, 50), (247, 247, 247), (44, 123, 182)  # told apart with any colour vision
INK, FAINT, MARK = (20, 20, 20), (110, 110, 110), (0, 0, 0)


def surface(cells: "list[tuple[int, float, Row]]", pick: "Point") -> Image.Image:
    """Draw the grid: a row for each checkpoint, a column for each strength.

    A cell's colour is the mean gain over the base: blue is better, orange worse, the deeper the more. Points that were
    dropped earlier have fewer images, and their numbers are faint. The pick has a frame.
    """
    steps = sorted({step for step, _, _ in cells})
    strengths = sorted({strength for _, strength, _ in cells})
    width = LEFT + CELL[0] * len(strengths) + RIGHT
    height = TOP + CELL[1] * len(steps) + BOTTOM
    sheet = Image.new("RGB", (max(width, 640), height), "white")
    draw = ImageDraw.Draw(sheet)
    large, font, small = (ImageFont.load_default(size) for size in (18, 15, 12))
    last = max(row.images for _, _, row in cells)
    most = max(max(abs(row.gain.value) for _, _, row in cells), 1e-12)
    draw.text((16, 12), f"Gain over the base; picked: step {pick.step} at strength {pick.strength:g}", INK, large)
    draw.text((16, 38), "each cell: mean gain, its 95% interval, win rate, images", FAINT, small)
    for column, strength in enumerate(strengths):
        x = LEFT + CELL[0] * (column + 0.5)
        draw.text((x, TOP - 6), f"{strength:g}", INK, font, anchor="mb")
    for line, step in enumerate(steps):
        draw.text((LEFT - 12, TOP + CELL[1] * (line + 0.5)), f"step {step}", INK, font, anchor="rm")
    frame = None
    for step, strength, row in cells:
        x, y = LEFT + CELL[0] * strengths.index(strength), TOP + CELL[1] * steps.index(step)
        box = (x + 1, y + 1, x + CELL[0] - 1, y + CELL[1] - 1)
        fill = _colour(row.gain.value / most)
        ink = INK if sum(fill) > 380 else (255, 255, 255)
        draw.rectangle(box, fill=fill)
        faint = row.images < last
        gain, rate = row.gain, row.win_rate
        middle = x + CELL[0] / 2
        shown = tuple((3 * a + 2 * b) // 5 for a, b in zip(ink, fill, strict=True)) if faint else ink
        draw.text((middle, y + 17), f"{gain.value:+.4g}", shown, font, anchor="mm")
        draw.text((middle, y + 36), f"{gain.low:+.3g} to {gain.high:+.3g}", shown, small, anchor="mm")
        draw.text((middle, y + 54), f"wins {rate.rate:.2f}   {row.images} images", shown, small, anchor="mm")
        if (step, strength) == tuple(pick):
            frame = box
    if frame is not None:
        draw.rectangle(frame, outline=MARK, width=4)
    y = TOP + CELL[1] * len(steps) + 14
    draw.text((LEFT, y), "strength of what was trained", INK, font)
    for k in range(101):
        x = LEFT + 3 * k
        draw.rectangle((x, y + 30, x + 3, y + 42), fill=_colour(k / 50 - 1))
    draw.text((LEFT, y + 48), f"{-most:+.3g}", FAINT, small)
    draw.text((LEFT + 303, y + 48), f"{most:+.3g}", FAINT, small, anchor="ra")
    return sheet


def _colour(share: float) -> tuple[int, int, int]:
    """The colour of a gain, as a share of the largest, in [-1, 1]."""
    end, share = (BETTER, share) if share >= 0 else (WORSE, -share)
    return tuple(round(a + (b - a) * min(share, 1.0)) for a, b in zip(EVEN, end, strict=True))
