"""How well a policy ranks people's choices by itself: the accuracy of its implicit reward on held-out pairs.

A model trained by Diffusion-DPO is a reward model (arXiv 2311.12908): for a pair at one noise and timestep

    margin = -(beta/2) error_delta,    error_delta = (e_w - eref_w) - (e_l - eref_l)

and a pair is ranked correctly if its mean margin over several draws is positive. Nothing is generated: images and
captions are encoded once, and each draw is one forward pass of each model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dpo_fast.data import BadRow, Batch, PairDataset, PairIndex, PairTransform, Source, validation_loader
from dpo_fast.data.pairs import faulty, too_many_bad
from dpo_fast.draws import timesteps
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.findings import FEW
from dpo_fast.evaluation.formats import counted
from dpo_fast.forward import AdapterOff, FrozenUNet, Reference, conditioning_of, predict
from dpo_fast.kernels import pair_errors
from dpo_fast.models import nonfinite_rows
from dpo_fast.models.family import timesteps_within
from dpo_fast.models.load import component_config, family_of
from dpo_fast.models.opened import OneAtATime, settled
from dpo_fast.models.source import ModelSource
from dpo_fast.parallel import Ranks
from dpo_fast.statistics import Bootstrap, Interval

QUARTERS = 4  # noise levels, unless the timesteps are a small grid


@dataclass(frozen=True, eq=False)
class ImplicitRewards:
    """Policy minus reference errors on n pairs, in the order of the source; both models get the same draws."""

    pair_id: Tensor  # int64 [n]: row in the source
    captions: list[str]  # n
    timesteps: Tensor  # int64 [n, draws]
    chosen_delta: Tensor  # fp64 [n, draws]: policy minus reference error, of the chosen image
    rejected_delta: Tensor  # fp64 [n, draws]: likewise, of the rejected image
    levels: list[tuple[int, int]]  # first and last timestep of each noise level
    beta: float | None  # that the policy was trained with; None: not known
    bad: list[BadRow]  # pairs left out of the n: an image does not decode, or both are the same

    @property
    def error_delta(self) -> Tensor:
        """fp64 [n, draws]: the margin is -(beta/2) times this."""
        return self.chosen_delta - self.rejected_delta


def implicit_rewards(
    policy: ModelSource,
    reference: ModelSource,
    source: Source,
    index: PairIndex,  # without ties, as `build_index` returns it unless asked for soft labels
    ranks: Ranks,
    *,
    draws: int,  # of noise and timestep per pair, numbered 0 to draws - 1
    seed: int,
    batch_size: int,  # pairs
    num_workers: int,
    beta: float | None,
    max_bad_fraction: float,
    time_ids: str = "fixed",  # SDXL's, as in training: "fixed" or "real"
    min_timestep: int = 0,  # draw none below this one, as in training
    max_timestep: int | None = None,  # nor this one or any above; None: no limit
) -> ImplicitRewards | None:
    """Measure the pairs of `index`, every rank its share; the main rank returns the result, the others None.

    Images are cropped like held-out pairs in training: the centre, no flips, no dropped captions. Diffusion-DPO trains
    only the UNet, so both models use the reference's VAE, text encoders and schedule; both use the policy's resolution,
    precision, attention, memory order and zero_terminal_snr, which a run records. A policy that is a LoRA on the
    reference is loaded once, and its LoRA is switched off for the reference.

    Raises BadInput, on every rank, for models that do not go together, if more than `max_bad_fraction` of the pairs do
    not decode, if no pair can be measured, and for errors that are not finite.
    """
    assert draws >= 1 and batch_size >= 1 and len(index) > 0
    assert bool((index.label > 0.5).all()), "a tie has no better image"

    def work() -> tuple[_Measured, list[tuple[int, int]]]:
        models = _Models(policy, reference, ranks.device)
        family = models.family
        allowed = timesteps_within(family.timesteps, family.schedule, min_timestep, max_timestep)
        transform = PairTransform(
            resolution=models.resolution,
            seed=seed,
            timesteps=allowed,
            grid=models.family.timestep_grid,
            time_ids=time_ids,
        )
        loader = validation_loader(
            PairDataset(source, index, transform),
            batch_size=batch_size,
            draws=1,  # only the first; the others differ just in noise and timestep
            rank=ranks.rank,
            world_size=ranks.world_size,
            num_workers=num_workers,
            pin_memory=ranks.device.type == "cuda",
        )
        measured = _Measured([], [], [], [])
        with tqdm(total=len(index), desc="Implicit rewards", unit=" pairs", disable=not ranks.is_main) as bar:
            for batch in loader:
                measured.add(batch, *models.measure(batch, transform, draws))
                if len(faulty(measured.bad)) > max_bad_fraction * len(index):
                    raise too_many_bad(faulty(measured.bad), len(index), max_bad_fraction, None)
                bar.update(min(ranks.world_size * batch_size, len(index) - bar.n))  # other ranks keep pace
        return measured, noise_levels(allowed, grid=models.family.timestep_grid)

    measured, levels = ranks.on_all(work)
    parts = ranks.gather(measured)
    bad = sorted(row for part in parts for row in part.bad)
    if len(faulty(bad)) > max_bad_fraction * len(index):
        raise too_many_bad(faulty(bad), len(index), max_bad_fraction, None)
    if len(bad) == len(index):
        raise BadInput(
            f"{source.description}: none of its {len(bad)} held-out pairs can be measured: an image does not decode, or"
            " both are the same; name others"
        )
    if not ranks.is_main:
        return None
    pair_id = torch.cat([ids for part in parts for ids in part.pair_id])
    order = pair_id.argsort()
    pair_id = pair_id[order]
    caption_of = dict(zip(index.pair_id.tolist(), index.captions, strict=True))
    deltas = torch.cat([values for part in parts for values in part.deltas])[order]
    return ImplicitRewards(
        pair_id=pair_id,
        captions=[caption_of[row] for row in pair_id.tolist()],
        timesteps=torch.cat([values for part in parts for values in part.timesteps])[order],
        chosen_delta=deltas[..., 0],
        rejected_delta=deltas[..., 1],
        levels=levels,
        beta=beta,
        bad=bad,
    )


def noise_levels(timesteps: Tensor, *, grid: bool) -> list[tuple[int, int]]:
    """Return the first and last timestep of each noise level.

    Levels are quarters of the allowed `timesteps` (int64 [n], ascending); on a grid, or with at most four timesteps,
    each timestep is a level.
    """
    n = len(timesteps)
    parts = n if grid else min(n, QUARTERS)
    edges = [n * k // parts for k in range(parts + 1)]
    return [(int(timesteps[first]), int(timesteps[after - 1])) for first, after in pairwise(edges)]


# ---- what was found ----------------------------------------------------------------------------------------------


class _Share:
    """A share with its interval, where 0.5 is chance."""

    interval: Interval

    @property
    def decided(self) -> bool:
        """Whether the interval excludes 0.5."""
        return not self.interval.low <= 0.5 <= self.interval.high


@dataclass(frozen=True)
class LevelAccuracy(_Share):
    """The accuracy at one noise level, by the mean margin of a pair's draws at that level."""

    first: int  # timestep
    last: int
    pairs: int  # with a draw at this level
    interval: Interval

    @property
    def name(self) -> str:
        return f"timestep {self.first}" if self.first == self.last else f"timesteps {self.first} to {self.last}"


@dataclass(frozen=True)
class ImplicitAccuracy(_Share):
    """Shares of pairs whose chosen image has the higher implicit reward, ties counted half, with 95% intervals by the
    bootstrap over captions (`Bootstrap.share`)."""

    interval: Interval  # by a pair's mean margin over its draws
    one_draw: Interval  # by the margin of one draw, averaged over draws; training logs it as implicit_accuracy
    levels: list[LevelAccuracy]  # those with at least one draw
    margin: Interval | None  # the mean over pairs; None: beta is not known
    chosen_delta: Interval  # mean policy minus reference error of the chosen images; below 0 the policy is better
    rejected_delta: Interval  # likewise, of the rejected images
    beta: float | None
    pairs: int
    captions: int  # distinct
    draws: int
    ties: int  # pairs whose mean margin is exactly 0
    bad: int  # pairs left out: an image does not decode, or both are the same
    files: dict[str, dict[str, str]] = field(default_factory=dict)  # reference, policy, pairs -> path -> its revision

    def for_summary(self) -> dict[str, object]:
        """Return JSON-ready values."""
        return {
            **_with_interval("implicit_accuracy", self.interval),
            **_with_interval("implicit_accuracy_one_draw", self.one_draw),
            "implicit_accuracy_by_noise": [
                {"timesteps": [level.first, level.last], "pairs": level.pairs}
                | _with_interval("implicit_accuracy", level.interval)
                for level in self.levels
            ],
            **_with_interval("margin", self.margin),
            **_with_interval("chosen_error_delta", self.chosen_delta),
            **_with_interval("rejected_error_delta", self.rejected_delta),
            "beta": self.beta,
            "pairs": self.pairs,
            "captions": self.captions,
            "draws": self.draws,
            "ties": self.ties,
            "bad_rows": self.bad,
            "files": self.files,
        }

    @classmethod
    def from_summary(cls, found: Mapping[str, Any]) -> "ImplicitAccuracy":
        """The accuracy that `for_summary` gave. Raises LookupError and TypeError for other values."""
        return cls(
            interval=_interval_in(found, "implicit_accuracy"),
            one_draw=_interval_in(found, "implicit_accuracy_one_draw"),
            levels=[
                LevelAccuracy(
                    first=level["timesteps"][0],
                    last=level["timesteps"][1],
                    pairs=level["pairs"],
                    interval=_interval_in(level, "implicit_accuracy"),
                )
                for level in found["implicit_accuracy_by_noise"]
            ],
            margin=_interval_in(found, "margin"),
            chosen_delta=_interval_in(found, "chosen_error_delta"),
            rejected_delta=_interval_in(found, "rejected_error_delta"),
            beta=found["beta"],
            pairs=found["pairs"],
            captions=found["captions"],
            draws=found["draws"],
            ties=found["ties"],
            bad=found["bad_rows"],
            files=found["files"],
        )

    def __str__(self) -> str:
        rows = [("implicit accuracy", self.interval, f"by a pair's mean margin over {counted(self.draws, 'draw')}")]
        rows.append(("at one draw", self.one_draw, "the same by one margin; what training logs"))
        few = {level.pairs for level in self.levels} != {self.pairs}
        rows += [(level.name, level.interval, f"{level.pairs} pairs" if few else "") for level in self.levels]
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{name:{width}}  {interval}  {said}".rstrip() for name, interval, said in rows]
        if self.margin is not None:
            lines.append(f"{'mean margin':{width}}  {_short(self.margin)}  at beta {self.beta:g}")
        for name, delta in (("chosen", self.chosen_delta), ("rejected", self.rejected_delta)):
            lines.append(f"{name + ' error':{width}}  {_short(delta)}  policy minus reference")
        left_out = f", {self.bad} left out: an image does not decode, or both are the same" if self.bad else ""
        of = f"{counted(self.pairs, 'pair')} of {counted(self.captions, 'caption')}"
        lines.append(
            f"share of {of} whose chosen image the policy prefers [95% interval over captions]; 0.5 is chance;"
            f" {counted(self.ties, 'tie')}{left_out}"
        )
        if self.captions == 1:
            lines.append("only 1 caption: intervals are over its pairs, and say nothing of other captions")
        elif self.captions < FEW:
            lines.append(f"only {self.captions} captions: intervals are rough")
        return "\n".join(lines)


def accuracy(rewards: ImplicitRewards) -> ImplicitAccuracy:
    """Compute the accuracy of the rewards over all draws, at one draw, and by noise level."""
    captions, delta = rewards.captions, rewards.error_delta
    bootstrap = Bootstrap(captions)
    levels = []
    for first, last in rewards.levels:
        here = (rewards.timesteps >= first) & (rewards.timesteps <= last)
        pairs = here.any(1)
        if not pairs.any():
            continue
        # the mean has the sign of the sum, and a sum of zeros is a zero
        right = _right(delta.where(here, 0.0).sum(1)[pairs])
        whole = bool(pairs.all())
        some = captions if whole else [captions[row] for row in pairs.nonzero().flatten().tolist()]
        interval = (bootstrap if whole else Bootstrap(some)).share(right)
        levels.append(LevelAccuracy(first, last, len(some), interval))
    mean_delta = delta.mean(1)
    beta = rewards.beta
    return ImplicitAccuracy(
        interval=bootstrap.share(_right(mean_delta)),
        one_draw=bootstrap.share(_right(delta)),
        levels=levels,
        margin=None if beta is None else bootstrap.mean((beta / 2) * (0 - mean_delta)),
        chosen_delta=bootstrap.mean(rewards.chosen_delta.mean(1)),
        rejected_delta=bootstrap.mean(rewards.rejected_delta.mean(1)),
        beta=beta,
        pairs=len(captions),
        captions=len(set(captions)),
        draws=delta.shape[1],
        ties=int((mean_delta == 0).sum()),
        bad=len(rewards.bad),
    )


def _right(delta: Tensor) -> Tensor:
    """Return fp64 of the same shape: 1 where the chosen image has the higher reward, 1/2 in a tie, else 0."""
    return (delta < 0).double() + 0.5 * (delta == 0).double()


def _with_interval(name: str, of: Interval | None) -> dict[str, object]:
    return {name: of and of.value, f"{name}_ci95": of and [of.low, of.high]}


def _interval_in(found: Mapping[str, Any], name: str) -> Interval | None:
    return None if found[name] is None else Interval(found[name], *found[f"{name}_ci95"])


def _short(of: Interval) -> str:
    return f"{of.value:.3g} [{of.low:.3g}, {of.high:.3g}]"


# ---- measuring ---------------------------------------------------------------------------------------------------


@dataclass
class _Measured:
    """The measurements of one rank, batch by batch."""

    pair_id: list[Tensor]  # int64 [B]
    timesteps: list[Tensor]  # int64 [B, draws]
    deltas: list[Tensor]  # fp64 [B, draws, 2], chosen and rejected
    bad: list[BadRow]

    def add(self, batch: Batch, drawn: Tensor, deltas: Tensor) -> None:
        kept = batch.weight > 0
        self.pair_id.append(batch.pair_id[kept])
        self.timesteps.append(drawn[kept])
        self.deltas.append(deltas[kept])
        self.bad += [BadRow(row, "", reason) for row, reason in batch.bad]


class _Models:
    """Policy and reference on one device: both UNets, and the reference's other components."""

    def __init__(self, policy: ModelSource, reference: ModelSource, device: torch.device) -> None:
        reference = replace(
            reference,
            mixed_precision=policy.mixed_precision,
            attention=policy.attention,
            memory_order=policy.memory_order,
            max_token_length=policy.max_token_length,
            zero_terminal_snr=policy.zero_terminal_snr,
        )
        _check_fit(policy, reference)
        self.resolution = settled(policy).resolution
        self.device = device
        if replace(policy, adapter=None).weights() == reference.weights():
            self.family = OneAtATime(device).open(policy)
            self.policy_unet = self.family.unet
            self.reference: Reference = AdapterOff(self.family)
        else:
            other = OneAtATime(device).open(policy)
            predicts, self.policy_unet = other.schedule.prediction_type, other.unet
            del other  # its other components are not needed
            self.family = OneAtATime(device).open(reference)
            self.reference = FrozenUNet(self.family, self.family.unet)
            if self.family.schedule.prediction_type != predicts:
                raise BadInput(
                    f"the policy {policy} predicts {predicts} and {reference}, which it is measured against,"
                    f" {self.family.schedule.prediction_type}: name the model that the policy was trained from"
                )

    @torch.no_grad()
    def measure(self, batch: Batch, transform: PairTransform, draws: int) -> tuple[Tensor, Tensor]:
        """Return timesteps int64 [B, draws] and policy minus reference errors fp64 [B, draws, 2], on the CPU."""
        family = self.family
        drawn = [
            timesteps(
                transform.seed,
                batch.pair_id,
                torch.full_like(batch.pair_id, k),
                transform.timesteps,
                grid=transform.grid,
            )
            for k in range(draws)
        ]
        there = batch.to(self.device, non_blocking=True)
        latents = family.encode_images(there.pixels)
        overflown = nonfinite_rows(latents).view(2, -1).any(0).cpu()
        if overflown.any():
            raise family.not_finite(int(batch.pair_id[overflown][0]))
        encoded = family.encode_prompts(there.captions)
        for embeddings in encoded.values():
            overflown = nonfinite_rows(embeddings).cpu()
            if overflown.any():
                raise family.text_not_finite(f"row {int(batch.pair_id[overflown][0])}")
        conditioning = conditioning_of(family, there, encoded)
        found = []
        for k, of_draw in enumerate(drawn):
            visit = replace(there, draw=torch.full_like(there.draw, k), timesteps=of_draw.to(self.device))
            policy, reference, seed = self.policy_unet, self.reference, transform.seed
            errors = pair_errors(*predict(family, policy, reference, visit, latents, conditioning, seed))
            found.append(torch.stack([errors.error_delta, errors.ref_error]).view(2, 2, -1))
        delta, ref_error = torch.stack(found).double().cpu().permute(1, 3, 0, 2)  # [B, draws, 2] each
        self._check_finite(batch, delta, ref_error)
        return torch.stack(drawn, 1), delta

    def _check_finite(self, batch: Batch, delta: Tensor, ref_error: Tensor) -> None:
        spoilt = ~(delta.isfinite() & ref_error.isfinite()).flatten(1).all(1)
        if not spoilt.any():
            return
        place = int(spoilt.nonzero()[0])
        whose = "policy" if ref_error[place].isfinite().all() else "reference"
        remedy = {
            torch.float16: "use --mixed_precision bf16 or no",
            torch.bfloat16: "use --mixed_precision no",
            torch.float32: "its weights are spoilt, name an earlier checkpoint or another model",
        }[self.family.dtype]
        dtype = str(self.family.dtype).removeprefix("torch.")
        raise BadInput(f"row {int(batch.pair_id[place])}: the {whose}'s error is not finite in {dtype}; {remedy}")


def _check_fit(policy: ModelSource, reference: ModelSource) -> None:
    """Raise BadInput, by the models' configurations alone, for UNets that cannot take the same inputs."""
    against = f"{reference}, which the policy {policy} is measured against,"
    kinds = [family_of(source) for source in (policy, reference)]
    if kinds[0] is not kinds[1]:
        raise BadInput(f"{against} is a {kinds[1].name} model and the policy {kinds[0].name}: name one of its family")
    unets = [component_config(source, "unet") for source in (policy, reference)]
    for name, what in (("in_channels", "latent channels"), ("cross_attention_dim", "numbers a token of text")):
        ours, theirs = (unet.get(name) for unet in unets)
        if ours != theirs:
            raise BadInput(f"{against} takes {theirs} {what} and the policy {ours}: name the model it was trained from")
