"""What all model families share: a diffusers pipeline reduced to what Diffusion-DPO needs.

A family is the pipeline, its noise schedule and a few properties. Image tensors of pairs are [2B,...], chosen first;
conditioning is [B,...], one row per pair, and only `denoise` duplicates it.
"""

import copy
import ctypes
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin
from torch import nn

from dpo_fast.errors import BadInput
from dpo_fast.models import caption_limits
from dpo_fast.models.caption_limits import Limit
from dpo_fast.models.load_errors import bad_input
from dpo_fast.models.sampler import sampler_for
from dpo_fast.models.text_chunks import CHUNK
from dpo_fast.quiet import no_loading_bars
from dpo_fast.schedule import NoiseSchedule, noise_schedule, turbo_grid, usable_timesteps

logger = logging.getLogger(__name__)

Conditioning = dict[str, torch.Tensor]

# Keyed by the names that launchers and the public scripts use; "no" means no mixed precision.
COMPUTE_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Sides(NamedTuple):
    """What a model's config says about the sides of its images, in pixels."""

    vae_factor: int  # pixels per latent element, in each direction
    default_resolution: int
    resolution_multiple: int  # every resolution must be a multiple of it

    @classmethod
    def of(cls, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> "Sides":
        """Derive them from the configurations of a UNet and a VAE."""
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        return cls(factor, unet["sample_size"] * factor, factor * 2 ** (len(unet["block_out_channels"]) - 1))


def check_unet(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Raise BadInput for the configuration of a UNet that cannot be trained with that of its VAE."""
    latent_channels = vae["latent_channels"]
    if not unet["in_channels"] == unet["out_channels"] == latent_channels:
        raise BadInput(
            f"the UNet takes {unet['in_channels']} and gives {unet['out_channels']} channels but the VAE's latents have"
            f" {latent_channels}: inpainting, depth and editing models cannot be trained, use their base model"
        )
    if unet["time_cond_proj_dim"] is not None:
        raise BadInput(
            f"the UNet is conditioned on the guidance scale (time_cond_proj_dim {unet['time_cond_proj_dim']}): "
            "latent consistency models cannot be trained, use their base model"
        )


def check_resolution(resolution: int, multiple: int, path: str) -> None:
    """Raise BadInput if the model at `path` cannot make images with sides of `resolution` pixels."""
    if resolution % multiple:
        near = max(1, round(resolution / multiple)) * multiple
        raise BadInput(f"--resolution ({resolution}) must be a multiple of {multiple} for {path}, for example {near}")


def timesteps_within(
    timesteps: torch.Tensor,  # int64 [n], those that a model may be trained at
    schedule: NoiseSchedule,
    first: int,
    after: int | None,  # None: no upper bound
) -> torch.Tensor:
    """Return the timesteps t with first <= t < after, int64 [n]. Raises BadInput if there are none."""
    after = schedule.num_train_timesteps if after is None else after
    wanted = timesteps[(timesteps >= first) & (timesteps < after)]
    if not len(wanted):
        raise BadInput(
            f"--min_timestep ({first}) and --max_timestep ({after}) leave none of the model's timesteps,"
            f" {int(timesteps.min())} to {int(timesteps.max())}; widen them"
        )
    return wanted


class Family(ABC):
    """A loaded text-to-image model. Every component is on `device`, in eval mode and frozen (requires_grad False).
    The UNet's convolution weights are channels_last in memory unless loaded otherwise, and contiguous in files.

    Created by `dpo_fast.models.load_family`. Attributes besides the constructor's arguments:
    schedule: NoiseSchedule on `device`; sampler: how the pipeline's scheduler was derived from the model's to match it;
    timesteps: int64 [n] on the CPU, those that a pair may be trained at;
    default_resolution: pixels; resolution_multiple: every resolution must be a multiple of it, in pixels.
    """

    name: ClassVar[str]  # such as "sd15", "sdxl" or "turbo"
    pipeline_class: ClassVar[type[DiffusionPipeline]]  # as named in model_index.json
    image_to_image_class: ClassVar[type[DiffusionPipeline]]
    text_encoders: ClassVar[tuple[str, ...]]  # names of pipeline components
    usual_config: ClassVar[str]  # hub id of the configuration for a single file if none is given
    few_steps: ClassVar["type[Family]"]  # the same architecture distilled to few steps
    unused_parts: ClassVar[dict[str, object]] = {"feature_extractor": None, "image_encoder": None}  # never read
    sampling_steps: ClassVar[int]
    sampling_guidance: ClassVar[float]  # guidance_scale of the pipeline
    usual_resolution: ClassVar[int | None] = None  # pixels; None: as the UNet's sample_size says
    text_kind: ClassVar[str]  # what `encode_prompts` returns, in words, for the cache key
    needs_time_ids: ClassVar[bool] = False
    normalizes_latents: ClassVar[bool] = False  # whether the pipeline applies the VAE's latents_mean and latents_std
    timestep_grid: ClassVar[bool] = False  # whether it is trained only at the few timesteps of its sampler

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        dtype: torch.dtype,  # compute dtype: UNet inputs and outputs, text encoders
        device: torch.device,
        prediction_type: str | None = None,  # None: the scheduler's
        zero_terminal_snr: str = "auto",
        max_token_length: int = CHUNK,  # tokens of a caption that are encoded: 75, 150 or 225
    ) -> None:
        self.pipeline = pipeline
        self.dtype = dtype
        self.device = torch.device(device)
        self.max_token_length = max_token_length
        self._check_architecture()
        self.schedule = self._make_schedule(prediction_type, zero_terminal_snr)
        grid = turbo_grid(self.schedule.num_train_timesteps) if self.timestep_grid else None
        self.timesteps: torch.Tensor = usable_timesteps(self.schedule, grid).cpu()
        self.vae_factor, self.default_resolution, self.resolution_multiple = self.sides(
            pipeline.unet.config, pipeline.vae.config
        )
        self.latent_statistics = self._latent_statistics()
        self._empty_prompt: Conditioning | None = None
        self._limit_tokens()
        for module in self._modules().values():
            module.eval().requires_grad_(False).to(self.device)
        self.unet.to(memory_format=torch.channels_last)

    @classmethod
    def sides(cls, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> Sides:
        """Derive the sides of this family's images from the configurations of a UNet and a VAE."""
        sides = Sides.of(unet, vae)
        return sides if cls.usual_resolution is None else sides._replace(default_resolution=cls.usual_resolution)

    def _limit_tokens(self) -> None:
        """Cap each tokenizer at its text encoder's number of positions: some are saved without a maximum length."""
        for suffix in ("", "_2"):
            tokenizer = getattr(self.pipeline, f"tokenizer{suffix}", None)
            config = getattr(getattr(self.pipeline, f"text_encoder{suffix}", None), "config", None)
            positions = getattr(config, "max_position_embeddings", None)
            if tokenizer is not None and positions is not None and tokenizer.model_max_length > positions:
                tokenizer.model_max_length = positions

    def image_to_image_options(self) -> dict[str, object]:
        """Return the arguments of `image_to_image_class` other than the pipeline's components."""
        return {}

    @property
    def unet(self) -> UNet2DConditionModel:
        """The pipeline's own UNet."""
        return self.pipeline.unet

    @torch.no_grad()
    def encode_images(
        self,
        pixels: torch.Tensor,  # uint8 [N,3,H,W], any device
        batch_size: int = 8,
    ) -> torch.Tensor:
        """Encode images to latents, fp16 [N,C,h,w] on `device`: the VAE's posterior mean, scaled so that the pipeline's
        decoding undoes it: (mean - latents_mean) scaling_factor / latents_std in SDXL, mean scaling_factor in SD1.5
        and 2.

        With the mean rather than a sample, a pair's latents are one fixed tensor. A latent that overflows fp16 becomes
        infinite; `nonfinite_rows` finds such images without a synchronisation.

        On a CPU each image is encoded alone, whatever `batch_size`, so that its latents are bitwise independent of the
        rest of the batch (another batch size would sum in another order).
        """
        vae = self.pipeline.vae
        latents = []
        for chunk in pixels.split(1 if self.device.type == "cpu" else batch_size):
            images = (chunk.to(self.device, torch.float32) / 127.5 - 1).to(vae.dtype)
            mean = vae.encode(images).latent_dist.mean.float()
            if self.latent_statistics is not None:
                latents_mean, latents_std = self.latent_statistics
                mean = (mean - latents_mean) / latents_std
            latents.append((mean * vae.config.scaling_factor).half())
        return torch.cat(latents)

    @torch.no_grad()
    def decode_latents(
        self,
        latents: torch.Tensor,  # [N,C,h,w], any float dtype
        batch_size: int = 8,
    ) -> torch.Tensor:
        """Decode latents to images, uint8 [N,3,H,W] on `device`, as the pipeline does: the inverse of `encode_images`.

        The VAE runs in its own dtype. Sample with `output_type="latent"` and decode here: the VAE may be in fp32
        beside a half-precision UNet, which the pipeline's own decoding does not allow.
        """
        vae = self.pipeline.vae
        images = []
        for chunk in latents.split(batch_size):
            raw = chunk.to(self.device, torch.float32) / vae.config.scaling_factor
            if self.latent_statistics is not None:
                latents_mean, latents_std = self.latent_statistics
                raw = raw * latents_std + latents_mean
            pixels = vae.decode(raw.to(vae.dtype)).sample.float()
            images.append((pixels * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8))
        return torch.cat(images)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Encode N prompts as conditioning, fp16 [N,...] on `device`; a repeated prompt is encoded once.

        On a CPU each prompt is encoded alone, as images are.
        """
        unique = list(dict.fromkeys(prompts))
        row_of = {prompt: row for row, prompt in enumerate(unique)}
        rows = torch.tensor([row_of[prompt] for prompt in prompts])
        if self.device.type == "cuda":  # a copy from pinned memory does not block
            rows = rows.pin_memory()
        rows = rows.to(self.device, non_blocking=True)
        calls = [[prompt] for prompt in unique] if self.device.type == "cpu" else [unique]
        encoded = [self._encode(call) for call in calls]
        return {name: torch.cat([part[name].half() for part in encoded])[rows] for name in encoded[0]}

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Return (C, h, w) of the latents of a square image with sides of `resolution` pixels."""
        side = resolution // self.vae_factor
        return self.pipeline.unet.config.in_channels, side, side

    def not_finite(self, row: int) -> BadInput:
        """Return the error for a non-finite latent that `encode_images` returned for an image of `row`."""
        vae = str(self.pipeline.vae.dtype).removeprefix("torch.")
        return BadInput(
            f"row {row}: the VAE gave a non-finite latent (its dtype is {vae}, latents are fp16); use a VAE"
            " that is safe in fp16, for SDXL --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix,"
            " or --mixed_precision bf16 or no"
        )

    def text_not_finite(self, where: str) -> BadInput:
        """Return the error for a non-finite embedding of a caption; `where` says which caption, for the message."""
        dtype = str(self.dtype).removeprefix("torch.")
        return BadInput(
            f"{where}: the text encoders gave a non-finite embedding of the caption (they compute in"
            f" {dtype}, embeddings are kept in fp16); use --mixed_precision bf16 or no,"
            " and if that does not help leave the row out, or use other text encoders"
        )

    def cut_off(self, prompts: Sequence[str]) -> tuple[list[bool], int]:
        """Return whether each prompt has more tokens than are encoded (the rest are dropped), and how many are, without
        the start and the end."""
        limits = []
        for suffix in ("", "_2"):
            tokenizer = getattr(self.pipeline, f"tokenizer{suffix}", None)
            if tokenizer is not None:
                encoder = getattr(self.pipeline, f"text_encoder{suffix}", None)
                positions = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
                limits.append(Limit.of(tokenizer, positions, self.max_token_length))
        return caption_limits.cut_off(limits, prompts)

    def free_encoders(self, *, keep: bool) -> None:
        """Free the device memory of the VAE and text encoders, for training from encoded images and prompts.

        keep: move them to host memory, for `save_full`; otherwise delete them. `empty_prompt` keeps working either way.
        """
        self.empty_prompt()
        for name, module in self._modules().items():
            if module is not self.unet:
                if keep:
                    module.to("cpu")
                else:
                    self.pipeline.register_modules(**{name: None})
        del module
        _trim_heap()

    def empty_prompt(self) -> Conditioning:
        """Return the conditioning for a dropped caption, fp16 [1,...]: the pipeline's own unconditional input."""
        if self._empty_prompt is None:
            self._empty_prompt = self._unconditional(self.encode_prompts([""]))
        return self._empty_prompt

    @torch.no_grad()
    def sampling_inputs(self, prompts: list[str]) -> dict[str, Any]:
        """Return what the pipeline is called with to sample N prompts, as keyword arguments.

        Where 75 tokens of them are encoded, it encodes them itself. With a larger `max_token_length` they are encoded
        here, [N,...] in the compute dtype, with an unconditional input of the same length.
        """
        if self.max_token_length == CHUNK:
            return {"prompt": prompts}
        empty = self._unconditional(self._encode([""]))
        repeated = {name: tensor.expand(len(prompts), *tensor.shape[1:]) for name, tensor in empty.items()}
        return {**self._encode(prompts), **{f"negative_{name}": tensor for name, tensor in repeated.items()}}

    def denoise(
        self,
        unet: nn.Module,  # this family's UNet, or a copy or a wrapper of it
        noisy: torch.Tensor,  # [2B,C,h,w], compute dtype
        timesteps: torch.Tensor,  # int64 [B]
        conditioning: Mapping[str, torch.Tensor],  # [B,...] each
    ) -> torch.Tensor:
        """Return the prediction [2B,C,h,w] for both images of B pairs, which share timestep and conditioning."""
        both = {name: torch.cat((tensor, tensor)) for name, tensor in conditioning.items()}
        return unet(
            noisy,
            torch.cat((timesteps, timesteps)),
            encoder_hidden_states=both["prompt_embeds"].to(noisy.dtype),
            added_cond_kwargs=self._added_conditioning(both, noisy.dtype),
            return_dict=False,
        )[0]

    def save_full(self, folder: Path, unet_state: Mapping[str, torch.Tensor]) -> None:
        """Write the pipeline to `folder` with the UNet weights `unet_state` (the fp32 masters), as safetensors.

        The live modules are not touched. All weights are written in fp32, since `from_pretrained` without a dtype must
        give a pipeline that runs; the other components' weights have the precision in which they are held here. The
        saved scheduler has the schedule that the model was trained with (`dpo_fast.models.sampler`).
        """
        saved = copy.copy(self.pipeline)
        for name, module in self._modules().items():
            state = unet_state if name == "unet" else module.state_dict()
            setattr(saved, name, _float32_twin(module, state))
        for part in self.pipeline.components.values():  # tokenizers remember how the last prompts were padded and cut
            if (tokenizer := getattr(part, "backend_tokenizer", None)) is not None:
                tokenizer.no_padding()
                tokenizer.no_truncation()
        with no_loading_bars():
            saved.save_pretrained(folder, safe_serialization=True)

    @abstractmethod
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts as the pipeline does without classifier-free guidance; with a `max_token_length` of more than
        75, in chunks (`dpo_fast.models.text_chunks`). The names are those of the pipeline's arguments."""

    def _unconditional(self, encoded: Conditioning) -> Conditioning:
        """Return the pipeline's unconditional input, for the encoding of an empty prompt."""
        if self.pipeline.config.get("force_zeros_for_empty_prompt", False):
            return {name: torch.zeros_like(tensor) for name, tensor in encoded.items()}
        return encoded

    def _added_conditioning(self, conditioning: Conditioning, dtype: torch.dtype) -> Conditioning | None:
        """Return the UNet's added_cond_kwargs."""
        return None

    def _latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the mean and standard deviation of raw latents that the pipeline applies, fp32 [1,C,1,1], or None.

        As in diffusers: SDXL's pipelines apply both or neither, SD1.5's apply neither, and none of them applies a
        shift_factor. Raises BadInput for values that cannot be used.
        """
        config = self.pipeline.vae.config
        values = {name: config.get(name) for name in ("latents_mean", "latents_std")}
        applied = self.normalizes_latents and None not in values.values()
        ignored = [name for name, value in values.items() if value is not None and not applied]
        ignored += ["shift_factor"] if config.get("shift_factor") else []
        if ignored:
            logger.info("the VAE's %s: not applied, as in %s", " and ".join(ignored), type(self.pipeline).__name__)
        if not applied:
            return None
        with bad_input("the VAE's latents_mean and latents_std cannot be read", "correct its config.json"):
            tensors = {name: torch.tensor(value, dtype=torch.float32).flatten() for name, value in values.items()}
        for name, tensor in tensors.items():
            if len(tensor) != config.latent_channels or not tensor.isfinite().all():
                raise BadInput(
                    f"the VAE's {name} {values[name]} must be {config.latent_channels} numbers, one a channel"
                )
        if (tensors["latents_std"] <= 0).any():
            raise BadInput(f"the VAE's latents_std {values['latents_std']} must be greater than 0")
        return tuple(tensor.view(1, -1, 1, 1).to(self.device) for tensor in tensors.values())

    def _modules(self) -> dict[str, nn.Module]:
        return {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}

    def _check_architecture(self) -> None:
        unet = self.pipeline.unet.config
        check_unet(unet, self.pipeline.vae.config)
        if (unet.addition_embed_type == "text_time") != self.needs_time_ids:
            raise BadInput(
                f"the UNet's addition_embed_type is {unet.addition_embed_type!r}, which does not go with a "
                f"{type(self.pipeline).__name__}: check model_index.json and unet/config.json"
            )

    def _make_schedule(self, prediction_type: str | None, zero_terminal_snr: str) -> NoiseSchedule:
        """Return the schedule, and give the pipeline a scheduler that has it, for sampling and saving."""
        scheduler = self.pipeline.scheduler
        schedule = noise_schedule(
            scheduler.config,
            zero_terminal_snr=zero_terminal_snr,
            turbo=self.timestep_grid,
            prediction_type=prediction_type,
        )
        self.sampler = sampler_for(scheduler, schedule, turbo=self.timestep_grid)
        self.pipeline.scheduler = self.sampler.of(scheduler)
        if self.pipeline.scheduler is not scheduler:
            logger.info("sampled with %s (the model came with %s)", self.sampler, type(scheduler).__name__)
        return schedule.to(self.device)


def nonfinite_rows(latents: torch.Tensor) -> torch.Tensor:  # [N,...] -> bool [N]
    """Return which rows hold an infinity or a NaN, on the device of `latents` and without a synchronisation."""
    return ~latents.isfinite().flatten(1).all(1)


def nonfinite_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Return the names of the `tensors` (name, value of any float dtype) that hold a NaN or an infinity.

    Synchronises with the device once.
    """
    names, sums = zip(*((name, tensor.detach().sum(dtype=torch.float64)) for name, tensor in tensors), strict=True)
    return [name for name, finite in zip(names, torch.stack(sums).isfinite().tolist(), strict=True) if not finite]


def _trim_heap() -> None:
    """Return freed host memory to the system; by itself glibc keeps blocks of up to 32 MiB, which most weights are."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _float32_twin(module: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a module of the same class and config with `state` in fp32, sharing tensors that are already fp32."""
    with torch.device("meta"):
        config = copy.deepcopy(module.config)
        twin = type(module).from_config(config) if isinstance(module, ConfigMixin) else type(module)(config)
    weights = {name: tensor.detach().float().contiguous() for name, tensor in state.items()}  # files are contiguous
    twin.load_state_dict(weights, assign=True)
    return twin
