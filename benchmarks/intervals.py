"""How often the intervals hold the truth: of win rates over a grid of prompts, rates, images and ties; of means and
medians.

    python benchmarks/intervals.py
    python benchmarks/intervals.py --part uneven     prompts with different numbers of images

One image a prompt without ties is summed over all outcomes, the rest is simulated from seed 0: outcomes are a normal
variable cut at two thresholds, with a part that the images of a prompt share. About two minutes on one core, each.
"""

import argparse
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpo_fast.statistics import Bootstrap

PROMPTS = (10, 20, 40, 51, 80, 300)
RATES = (0.5, 0.7, 0.8, 0.9, 0.95)
MOST_TIES = 0.3
WORLDS = (  # images per prompt, with ties, correlation of two images of a prompt
    (1, False, 0.0),
    (1, True, 0.0),
    (3, False, 0.5),
    (3, True, 0.5),
    (3, False, 0.1),
)
UNEVEN: dict[str, Callable[[int], list[int]]] = {  # number of prompts -> images of each
    "1, 2, 20 in turn": lambda prompts: [(1, 2, 20)[k % 3] for k in range(prompts)],
    "1 to 8 in turn": lambda prompts: [1 + k % 8 for k in range(prompts)],
    "20 of each tenth, else 1": lambda prompts: [20 if k % 10 == 0 else 1 for k in range(prompts)],
    "50 of one, else 1": lambda prompts: [50 if k == 0 else 1 for k in range(prompts)],
}
UNEVEN_PROMPTS = (12, 21, 40, 80)
ALIKE = (0.1, 0.5, 0.9)  # correlation of two images of a prompt


def exact(prompts: int, rate: float, bootstrap: Bootstrap) -> float:
    """Return the exact coverage with one image per prompt and no ties."""
    held = 0.0
    for won in range(prompts + 1):
        of = bootstrap.share((torch.arange(prompts) < won).double())
        if of.low <= rate <= of.high:
            held += math.comb(prompts, won) * rate**won * (1 - rate) ** (prompts - won)
    return held


def outcomes(
    sets: int, images: Sequence[int], rate: float, tied: float, alike: float, generator: torch.Generator
) -> Tensor:
    """Draw outcomes, fp64 [sets, sum of images]: 1 won, 1/2 tied, 0 lost. images: the number for each prompt."""
    latent = scores(sets, images, alike, generator)
    loss = 1 - rate - tied / 2
    lost, less = (torch.special.ndtri(torch.tensor(edge, dtype=torch.float64)) for edge in (loss, loss + tied))
    return 0.5 * (latent > lost).double() + 0.5 * (latent > less).double()


def scores(sets: int, images: Sequence[int], alike: float, generator: torch.Generator) -> Tensor:
    """Draw standard normal scores, fp64 [sets, sum of images], that correlate within a prompt by `alike`."""
    of_prompt = torch.randn(sets, len(images), generator=generator, dtype=torch.float64)
    of_image = torch.randn(sets, sum(images), generator=generator, dtype=torch.float64)
    of_prompt = of_prompt.repeat_interleave(torch.tensor(images), 1)
    return math.sqrt(alike) * of_prompt + math.sqrt(1 - alike) * of_image


def held(outcomes: Tensor, rate: float, bootstrap: Bootstrap) -> float:
    intervals = [bootstrap.share(of) for of in outcomes]
    return sum(of.low <= rate <= of.high for of in intervals) / len(intervals)


def normal_held(
    sets: int, images: Sequence[int], alike: float, resamples: int, generator: torch.Generator
) -> tuple[float, float]:
    """Return the coverage of the mean and of the median of normal scores."""
    bootstrap, held = Bootstrap(names(images), resamples), [0, 0]
    for of_set in scores(sets, images, alike, generator):
        for place, of in enumerate((bootstrap.mean(of_set), bootstrap.median(of_set))):
            held[place] += of.low <= 0 <= of.high
    return held[0] / sets, held[1] / sets


def names(images: Sequence[int]) -> list[str]:
    """Return the prompt of each image."""
    return [str(prompt) for prompt, number in enumerate(images) for _ in range(number)]


def even(sets: int, resamples: int, generator: torch.Generator) -> None:
    """Print the table of prompts with equal numbers of images."""
    print("prompts" + "".join(f"{rate:8}" for rate in RATES))
    for images, ties, alike in WORLDS:
        print(f"{images} of a prompt, correlation {alike}, {'with' if ties else 'no'} ties")
        for prompts in PROMPTS:
            bootstrap = Bootstrap(names([images] * prompts), resamples)
            shares = []
            for rate in RATES:
                tied = min(MOST_TIES, 1 - rate) if ties else 0.0
                if images == 1 and not ties:
                    shares.append(exact(prompts, rate, bootstrap))
                else:
                    of = outcomes(sets, [images] * prompts, rate, tied, alike, generator)
                    shares.append(held(of, rate, bootstrap))
            print(f"{prompts:7}" + "".join(f"{share:8.3f}" for share in shares), flush=True)
    print("mean and median of normal scores, one of a prompt")
    for prompts in PROMPTS:
        shares = normal_held(sets, [1] * prompts, 0.0, resamples, generator)
        print(f"{prompts:7}" + "".join(f"{share:8.3f}" for share in shares), flush=True)


def uneven(sets: int, resamples: int, generator: torch.Generator) -> None:
    """Print the table of prompts with different numbers of images."""
    head = "".join(f"{rate:8}" for rate in RATES) + "    mean  median"
    for name, design in UNEVEN.items():
        for alike in ALIKE:
            print(f"{name}, correlation {alike}\nprompts  worth{head}")
            for prompts in UNEVEN_PROMPTS:
                images = design(prompts)
                bootstrap = Bootstrap(names(images), resamples)
                shares = [held(outcomes(sets, images, rate, 0.0, alike, generator), rate, bootstrap) for rate in RATES]
                shares += normal_held(sets, images, alike, resamples, generator)
                row = "".join(f"{share:8.3f}" for share in shares)
                print(f"{prompts:7}{bootstrap.effective:7.1f}{row}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--part", choices=("even", "uneven"), default="even")
    parser.add_argument("--sets", type=int, help="simulated data sets of each kind; default: 2000, 1000 of uneven ones")
    parser.add_argument("--resamples", type=int, help="default: 1000, 400 of uneven ones")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    work, sets, resamples = (even, 2000, 1000) if options.part == "even" else (uneven, 1000, 400)
    work(options.sets or sets, options.resamples or resamples, torch.Generator().manual_seed(0))


if __name__ == "__main__":
    main()
