"""Train the base pipeline of the shapes world: `python -m dpo_fast.shapes.pretrain`.

Plain epsilon prediction (arXiv 2006.11239) on rendered scenes; a tenth of the captions are empty, for classifier-free
guidance. The text encoder is trained too. The exponential moving average of the weights is saved.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import nn
from torch.nn.functional import mse_loss
from tqdm import tqdm

from dpo_fast.files import atomic_folder, write_json
from dpo_fast.shapes.base import new_base
from dpo_fast.shapes.render import HEIGHTS, SCENES, render
from dpo_fast.shapes.score import appeal, faithfulness, is_right

LEARNING_RATE = 1.5e-3
WARMUP = 100  # steps
CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.998
SAMPLING_STEPS = 10
GUIDANCE = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dpo_fast.shapes.pretrain", description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "pipeline")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch_size", type=int, default=32, help="scenes a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure_every", type=int, default=1000, help="steps between two lines on 64 prompts")
    arguments = parser.parse_args()

    started = time.monotonic()
    average = train(arguments.steps, arguments.batch_size, arguments.seed, arguments.measure_every)
    report = measure(average, prompts=512, seed=arguments.seed + 1)
    report |= {"steps": arguments.steps, "batch_size": arguments.batch_size, "seed": arguments.seed}
    report["seconds"] = round(time.monotonic() - started)
    with atomic_folder(arguments.output_dir) as folder:
        average.save_pretrained(folder)
        write_json(folder / "pretraining.json", report)
    print(f"right scenes in {report['right']:.1%} of {report['prompts']} prompts; {arguments.output_dir}")


def train(steps: int, batch_size: int, seed: int, measure_every: int) -> StableDiffusionPipeline:
    """Train from scratch and return the pipeline with the averaged weights."""
    torch.manual_seed(seed)
    base = new_base()
    average = copy.deepcopy(base)
    average.set_progress_bar_config(disable=True)
    learned = nn.ModuleList([base.unet, base.text_encoder]).train()
    averaged = nn.ModuleList([average.unet, average.text_encoder]).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(learned.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    tokens = _tokens(base, [scene.caption for scene in SCENES])
    empty = _tokens(base, [""])
    bar = tqdm(range(1, steps + 1), desc="pretraining", mininterval=2)
    for step in bar:
        # A batch of scenes, some without their captions
        rows = torch.randint(len(SCENES), (batch_size,))
        pixels = render([SCENES[row] for row in rows], torch.randint(len(HEIGHTS), (batch_size,)))
        captions = torch.where(torch.rand(batch_size, 1) < CAPTION_DROPOUT, empty, tokens[rows])
        # Noise it: the latents are the pixels in [-1, 1]
        latents = pixels * 2 - 1
        noise = torch.randn_like(latents)
        timesteps = torch.randint(base.scheduler.config.num_train_timesteps, (batch_size,))
        noisy = base.scheduler.add_noise(latents, noise, timesteps)
        # Predict the noise and learn
        loss = mse_loss(base.unet(noisy, timesteps, base.text_encoder(captions)[0]).sample, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(EMA_DECAY, step / (step + 10))  # so that the first steps are soon forgotten
        torch._foreach_lerp_(list(averaged.parameters()), list(learned.parameters()), 1 - decay)
        if step % measure_every == 0 and step < steps:
            report = measure(average, prompts=64, seed=seed + 1)
            bar.write(f"step {step}: loss {loss.item():.4f}, right scenes {report['right']:.1%}")
    return average


@torch.no_grad()
def measure(pipeline: StableDiffusionPipeline, prompts: int, seed: int) -> dict:
    """Score images of `prompts` random captions: "right", "faithfulness" and "appeal" are means over them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(SCENES), (prompts,), generator=generator)
    captions = [SCENES[row].caption for row in rows]
    images = pipeline(
        captions,
        num_inference_steps=SAMPLING_STEPS,
        guidance_scale=GUIDANCE,
        generator=generator,
        output_type="pt",
    ).images
    return {
        "right": is_right(images, captions).double().mean().item(),
        "faithfulness": faithfulness(images, captions).mean().item(),
        "appeal": appeal(images).mean().item(),
        "prompts": prompts,
        "sampling_steps": SAMPLING_STEPS,
        "guidance": GUIDANCE,
    }


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _tokens(base: StableDiffusionPipeline, captions: list[str]) -> torch.Tensor:
    tokenizer = base.tokenizer
    return tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids


if __name__ == "__main__":
    main()
