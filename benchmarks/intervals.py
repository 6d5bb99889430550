"""How often the intervals hold the truth: of win rates over a grid of prompts, rates, images and ties; of means.

    python benchmarks/intervals.py

One image a prompt without ties is summed over all outcomes, the rest is simulated: outcomes are a normal variable cut
at two thresholds, with a part that the images of a prompt share. About two minutes on one core.
"""

import argparse
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_fast.evaluation.statistics import Bootstrap

PROMPTS = (10, 20, 40, 51, 80, 300)
RATES = (0.5, 0.7, 0.8, 0.9, 0.95)
MOST_TIES = 0.3
WORLDS = (  # images a prompt, with ties, correlation of two images of a prompt
    (1, False, 0.0),
    (1, True, 0.0),
    (3, False, 0.5),
    (3, True, 0.5),
    (3, False, 0.1),
)


def exact(prompts: int, rate: float, bootstrap: Bootstrap) -> float:
    """Coverage of one image a prompt, none a tie."""
    held = 0.0
    for won in range(prompts + 1):
        of = bootstrap.share((torch.arange(prompts) < won).double())
        if of.low <= rate <= of.high:
            held += math.comb(prompts, won) * rate**won * (1 - rate) ** (prompts - won)
    return held


def outcomes(
    sets: int, prompts: int, images: int, rate: float, tied: float, alike: float, generator: torch.Generator
) -> Tensor:
    """fp64 [sets, prompts * images]: 1 won, 1/2 tied, 0 lost."""
    of_prompt = torch.randn(sets, prompts, 1, generator=generator, dtype=torch.float64)
    of_image = torch.randn(sets, prompts, images, generator=generator, dtype=torch.float64)
    latent = math.sqrt(alike) * of_prompt + math.sqrt(1 - alike) * of_image
    loss = 1 - rate - tied / 2
    lost, less = (torch.special.ndtri(torch.tensor(edge, dtype=torch.float64)) for edge in (loss, loss + tied))
    return (0.5 * (latent > lost).double() + 0.5 * (latent > less).double()).flatten(1)


def held(outcomes: Tensor, rate: float, bootstrap: Bootstrap) -> float:
    intervals = [bootstrap.share(of) for of in outcomes]
    return sum(of.low <= rate <= of.high for of in intervals) / len(intervals)


def mean_held(sets: int, prompts: int, resamples: int, generator: torch.Generator) -> float:
    """Coverage of the mean of one normal score a prompt."""
    bootstrap = Bootstrap([str(k) for k in range(prompts)], resamples)
    scores = torch.randn(sets, prompts, generator=generator, dtype=torch.float64)
    return sum(of.low <= 0 <= of.high for of in map(bootstrap.mean, scores)) / sets


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sets", type=int, default=2000, help="simulated data sets of each kind")
    parser.add_argument("--resamples", type=int, default=1000)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    print("prompts" + "".join(f"{rate:8}" for rate in RATES))
    for images, ties, alike in WORLDS:
        print(f"{images} of a prompt, correlation {alike}, {'with' if ties else 'no'} ties")
        for prompts in PROMPTS:
            bootstrap = Bootstrap([str(k) for k in range(prompts) for _ in range(images)], options.resamples)
            shares = []
            for rate in RATES:
                tied = min(MOST_TIES, 1 - rate) if ties else 0.0
                if images == 1 and not ties:
                    shares.append(exact(prompts, rate, bootstrap))
                else:
                    of = outcomes(options.sets, prompts, images, rate, tied, alike, generator)
                    shares.append(held(of, rate, bootstrap))
            print(f"{prompts:7}" + "".join(f"{share:8.3f}" for share in shares), flush=True)
    print("mean of normal scores, one of a prompt")
    for prompts in PROMPTS:
        share = mean_held(options.sets, prompts, options.resamples, generator)
        print(f"{prompts:7}{share:8.3f}", flush=True)


if __name__ == "__main__":
    main()
