"""The training configuration: every flag with its unit, the presets, how the layers combine, and what is refused.

Layers, later ones win: the defaults below, a preset, a YAML recipe (`--config`), the command line.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import yaml

from dpo_fast.errors import BadInput
from dpo_fast.presets import DEFAULT_BETA, PICKAPIC, PRESETS

C = TypeVar("C")
TOKEN_LENGTHS = (75, 150, 225)  # tokens of a caption that can be encoded


def preset_values(flags: Mapping[str, object]) -> dict[str, object]:
    """Return the preset that `flags` name, and what it sets: the values of the flags that are not given.

    The preset is shapes if the flags name neither a preset nor a model nor pairs.
    """
    preset = flags.get("preset")
    if all(flags.get(name) is None for name in ("preset", "pretrained_model_name_or_path", "dataset_name")):
        preset = "shapes"
    values = {"preset": preset, **PRESETS.get(preset, {})}
    if DEFAULT_BETA.get(flags.get("objective"), DEFAULT_BETA["dpo"]) != DEFAULT_BETA["dpo"]:
        values.pop("beta_dpo", None)  # a preset's is on the scale of dpo
    return values


def _on_preset(config: type[C]) -> type[C]:
    """Give the fields that a caller leaves out the preset's values, as on the command line."""
    make = config.__init__

    @functools.wraps(make)
    def __init__(self, **given: object) -> None:
        make(self, **{**preset_values(given), **given})

    config.__init__ = __init__
    return config


@_on_preset
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Align a text-to-image diffusion model with preference pairs by Diffusion-DPO (arXiv 2311.12908)."""

    # A line like the next one begins a section of --help.

    # ---- preset ------------------------------------------------------------------------------------------------------
    preset: Literal["shapes", "sd15", "sdxl", "sdxl-lora", "turbo"] | None = None
    """A recipe to start from, every other flag overrides it: the built-in tiny world (shapes; what you get when neither
    model nor data is named), or a published one."""
    config: Path | None = None
    """A YAML file of flags (the config.yaml of an earlier run, for one); flags on the command line override it."""
    dry_run: Literal["plan", "timed"] | None = None
    """Train nothing, but print what would be trained. The bare flag (plan) opens the pairs and prints the resolved
    configuration, what is in the set, memory, disk and FLOPs a step, and warnings; --dry-run timed also takes a few
    steps, and says how long the run will last. Exit status 2: the run could not start."""

    # ---- model -------------------------------------------------------------------------------------------------------
    pretrained_model_name_or_path: str | None = None
    """The base model: a hub id, a diffusers folder, or a single .safetensors file (SD1.5, SDXL, SDXL-Turbo)."""
    pretrained_vae_model_name_or_path: str | None = None
    """Another VAE (hub id or folder), for example one that is safe in fp16."""
    revision: str | None = None
    """Hub revision (branch, tag, commit) of the base model."""
    variant: str | None = None
    """Weight file variant of the base model, for example fp16."""
    single_file_config: str | None = None
    """Pipeline configuration (hub id or folder) for a single-file model, and the text encoders and VAE that the file
    lacks; None: the hub's for the detected family, and the file must be whole."""
    is_turbo: bool = False
    """The model is SDXL-Turbo or SD-Turbo: train on its 4-step timestep grid. Never guessed from the path."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the UNet predicts; None: as the model's files say (the scheduler's config; a single file's mark, v_pred)."""
    zero_terminal_snr: Literal["auto", "on", "off"] = "auto"
    """Rescale the noise schedule to zero terminal SNR; auto: on for Turbo and where the model's files say so (the
    scheduler's config; a single file's mark, ztsnr). The result's scheduler has it too, but for Turbo's own."""
    cache_dir: str | None = None
    """Where the hub's downloads are kept; None: the hub's default."""

    # ---- data --------------------------------------------------------------------------------------------------------
    dataset_name: str | None = None
    """Preference pairs: a hub id, a folder or a parquet / arrow / JSONL file. Formats: docs/pairs.md."""
    dataset_config_name: str | None = None
    """Configuration name of a hub data set."""
    dataset_split_name: str | None = None
    """Split; None: train, else the only one there is."""
    image_columns: tuple[str, str] | None = None
    """The two image columns, in the label's order; None: jpg_0 jpg_1, or chosen rejected."""
    label_column: str | None = None
    """Column with 1 (first image wins), 0 (second wins), 0.5 (tie); None: label_0."""
    preference: Literal["quality", "faithfulness", "appeal"] | None = None
    """For the built-in pairs: train on the column label_<preference>, and let that scorer lead the evaluation."""
    caption_column: str | None = None
    """Column with the prompt; None: caption or prompt."""
    max_token_length: int = 75
    """Tokens of a caption that are encoded: 75, or 150 or 225 in chunks of 75, as kohya's sd-scripts does. Samples and
    evaluation follow; what is longer is cut off, and counted at the start."""
    streaming: bool = False
    """Read a hub data set as a stream, without storing it; shuffled in windows of 1024 pairs. Needs max_train_steps."""
    max_train_samples: int | None = None
    """Use only the first N rows."""
    soft_labels: bool = False
    """Train on labels anywhere in [0, 1], ties included, as soft labels; otherwise ties are dropped and counted."""
    max_bad_fraction: float = 0.01
    """Stop when more than this fraction of the rows is unusable (undecodable image, empty caption, missing file)."""
    validation_fraction: float = 0.0
    """Fraction of the captions held out to measure implicit accuracy; no image of theirs is trained on."""
    resolution: int | None = None
    """Side of the square training images in pixels; None: the model's own."""
    hflip: bool = False
    """Flip both images of a pair, or neither, at random."""
    random_crop: bool = False
    """Crop both images of a pair at one random place, instead of at the centre."""
    time_ids: Literal["fixed", "real"] = "fixed"
    """SDXL size conditioning: (res, res, 0, 0, res, res), or the true size and crop of the pair's smaller image."""
    proportion_empty_prompts: float = 0.0
    """Probability that a pair is trained with an empty caption."""

    # ---- objective ---------------------------------------------------------------------------------------------------
    objective: Literal["dpo", "ipo", "hinge", "cdpo", "kto", "mapo", "sft"] | str = "dpo"
    """The loss, by its name or as module:function for your own (CONTRIBUTING.md)."""
    beta_dpo: float | None = None
    """Strength of the tie to the reference, in the paper's unit (docs/training.md); None: 5000, mapo 0.1."""
    label_smoothing: float = 0.0
    """cdpo: the assumed probability that a label is wrong, in [0, 0.5)."""
    min_timestep: int = 0
    """Train at no timestep below this one: where there is little noise, the errors say little about the scene."""
    max_timestep: int | None = None
    """Train at no timestep from this one on; None: no limit."""

    # ---- LoRA --------------------------------------------------------------------------------------------------------
    tuning: Literal["lora", "full"] = "lora"
    """Train low-rank adapters or the whole UNet."""
    rank: int = 4
    """LoRA rank."""
    lora_alpha: float | None = None
    """LoRA alpha: the update is scaled by alpha / rank, which is folded into the saved tensors; None: equal to rank."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names of the UNet modules that get an adapter, or of a group: attention (the default), attention+ff, all-linear,
    conv (all linear layers and convolutions but the first and the last)."""
    init_lora: str | None = None
    """A LoRA (file, folder, hub id) merged into the base first, whole: it becomes part of the reference."""

    # ---- training ----------------------------------------------------------------------------------------------------
    train_batch_size: int = 4
    """Pairs a forward pass and rank."""
    gradient_accumulation_steps: int = 1
    """Forward passes an optimizer step (where pairs_per_step is not given)."""
    pairs_per_step: int | None = None
    """Pairs an optimizer step over all ranks; derives gradient_accumulation_steps."""
    num_train_epochs: int = 1
    """Passes over the pairs, where max_train_steps is not given."""
    max_train_steps: int | None = None
    """Optimizer steps."""
    learning_rate: float = 1e-5
    """Learning rate after the warm-up (see scale_lr)."""
    scale_lr: bool = False
    """Multiply learning_rate by batch size x accumulation x ranks, as the public scripts do."""
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = "constant"
    """Learning rate schedule over the optimizer steps."""
    lr_warmup_steps: int = 500
    """Warm-up in optimizer steps (the schedule `constant` has none)."""
    lr_num_cycles: int = 1
    """Restarts of cosine_with_restarts."""
    lr_power: float = 1.0
    """Power of the polynomial schedule."""
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    """adamw is PyTorch's fused one; adamw8bit needs bitsandbytes; adafactor runs at the given learning rate."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_weight_decay: float = 1e-2
    """Decoupled weight decay (Adafactor's too)."""
    adam_epsilon: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this; 0: do not clip."""
    max_skipped_updates: int = 20
    """Stop with a diagnosis after this many non-finite updates in a row (each is skipped)."""
    use_ema: bool = False
    """Keep an exponential moving average of the trained weights; it is what is sampled and exported."""
    ema_decay: float = 0.9999
    """EMA decay an optimizer step, in [0, 1)."""
    seed: int | None = None
    """Everything random follows from it; None: drawn, printed and recorded."""

    # ---- memory and speed --------------------------------------------------------------------------------------------
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Compute dtype: no is fp32. Masters are fp32 always. None: what `accelerate launch` was given, else no."""
    gradient_checkpointing: Literal["none", "selective", "full"] = "none"
    """Compute activations again in the backward pass, to save memory. full (also the bare flag): about a third more
    time; selective: keep what products, convolutions and attention give, and compute only the rest again."""
    attention: Literal["auto", "sdpa", "cudnn", "flash", "efficient", "xformers"] = "auto"
    """Attention of the UNet, the same for policy and reference; sdpa: PyTorch's own choice; cudnn, flash, efficient:
    that kernel first, where it can be used; auto: what is proven and fastest on this machine (--prove), else sdpa."""
    memory_order: Literal["auto", "channels_last", "contiguous"] = "auto"
    """Memory order of the UNet's convolutions; auto: the faster one on this machine (--prove), else channels_last."""
    compile: Literal["auto", "off", "regional", "resnets", "regional-tuned", "resnets-tuned"] = "auto"
    """torch.compile in the first step. regional: the UNet's transformer blocks, each kind once, rounding as eager ones
    do; resnets: those and the resnets; -tuned: Inductor may time reductions; auto: what is proven and pays on this
    machine (--prove), else off. (The whole UNet as one program is not offered: see docs/performance.md.)"""
    backend: Literal["auto", "reference", "triton", "native"] = "auto"
    """Which implementation of the pair kernels to run; auto: the fastest that is proven on this machine (--prove),
    else native on a CPU and plain PyTorch (reference) on a GPU."""
    allow_tf32: bool = False
    """Let fp32 matrix products on the GPU use TF32."""
    prove: bool = True
    """Before a run of some two minutes or more, prove and time what is "auto" above, in other processes, within a
    minute (longer where compiling may pay); outcomes are kept in the cache folder. --no-prove: the plain defaults."""
    choices: Path | None = None
    """A file that says what is "auto" above, instead of a proof: the config.yaml of another run."""
    dataloader_num_workers: int = 2
    """Processes that decode images (threads, while the cache is built); 0: decode in the training process."""
    vae_encode_batch_size: int = 8
    """Images a VAE call."""

    # ---- cache -------------------------------------------------------------------------------------------------------
    cache: bool = True
    """Encode every image and caption once and keep them on disk; --no-cache encodes them anew at every visit."""
    latent_cache_dir: Path | None = None
    """Where the cache is; None: $DPO_FAST_CACHE, or the folder dpo_fast in $HF_HOME, or in ~/.cache."""
    cached_reference: int | None = None
    """Train from cached errors of the reference at K draws a pair (visit v is draw v mod K), computing first what is
    missing: no reference is held or run, and further runs over beta, learning rate, objective or rank share them."""

    # ---- output and checkpoints --------------------------------------------------------------------------------------
    output_dir: Path | None = None
    """Folder of the run; None: runs/<preset, or train>-<time>."""
    overwrite: bool = False
    """Replace what an earlier run left in output_dir."""
    resume_from_checkpoint: str | None = None
    """Go on to the same result from a checkpoint: `latest`, a checkpoint folder, or `auto`: from the latest one where
    there is one, else from the start, so that one command line works the first time and after any interruption."""
    checkpointing_steps: int = 500
    """Save the training state every N optimizer steps."""
    checkpointing_minutes: float | None = None
    """Also save it when this many minutes have passed since the last save, after the optimizer step in progress."""
    checkpoints_total_limit: int | None = None
    """Keep only the newest N checkpoints."""

    # ---- result ------------------------------------------------------------------------------------------------------
    export: tuple[Literal["diffusers", "kohya", "single_file"], ...] | None = None
    """Formats of the result: diffusers' own, which is always written; kohya, a LoRA for ComfyUI, A1111, Forge and
    kohya's scripts; single_file, a whole checkpoint for these. None: diffusers, and kohya for a LoRA."""
    export_dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Precision of kohya and single_file; None: fp32 for kohya, fp16 for single_file."""

    # ---- logging -----------------------------------------------------------------------------------------------------
    log_every: int = 10
    """Optimizer steps between two lines of metrics.jsonl (where CPU and GPU wait for each other)."""
    report_to: str = "none"
    """Trackers through accelerate: tensorboard, wandb, comet_ml, all, none."""
    logging_dir: str = "logs"
    """Where trackers write, inside output_dir."""
    tracker_name: str = "diffusion-dpo"
    """Project name for the trackers."""

    # ---- samples and evaluation --------------------------------------------------------------------------------------
    run_validation: bool = False
    """Measure held-out accuracy and draw samples (before over after, same seeds) during and after training."""
    validation_steps: int = 200
    """Optimizer steps between two validations."""
    validation_prompts: tuple[str, ...] = ()
    """Prompts of the samples; none given: the first four held-out (or training) captions."""
    sampling_steps: int | None = None
    """Denoising steps of samples and evaluation; None: the model's usual (50, Turbo 4)."""
    sampling_guidance: float | None = None
    """Classifier-free guidance scale of both; None: the model's usual (SD1.5 7.5, SDXL 5, Turbo 0)."""
    eval_scorers: tuple[str, ...] = ()
    """After training, compare base and result by these scorers on the same prompts and seeds, as `dpo_fast.evaluate`
    does (report.html, summary.json, scores.parquet, samples.png). The first is what was trained towards. Names:
    docs/evaluation.md."""
    eval_prompts: Path | None = None
    """Prompts of that comparison: a text file, one a line, or a set of `dpo_fast.evaluate` (partiprompts, hps, ...)."""
    eval_images: int | None = None
    """Images a model in that comparison, the prompts taken in turn with other seeds; None: one a prompt."""
    eval_batch_size: int = 8
    """Images generated, and scored, at once in that comparison."""
    eval_every: int | None = None
    """Every N steps score images of the policy as it is then and compare them with the base's, by the first of
    eval_scorers and on half of eval_prompts; the evaluation at the end takes the other half. None: never."""
    eval_every_images: int = 64
    """Images that each comparison of eval_every takes."""
    stop_when_worse: bool = False
    """With eval_every: end the training once the scores have fallen below the best so far by more than chance, and take
    that checkpoint as the result."""
    scorer_models: Path | None = None
    """Folder that holds the scorers' models as OWNER/NAME; None: the hub."""

    # ---- upload ------------------------------------------------------------------------------------------------------
    push_to_hub: bool = False
    """Upload the result to the hub at the end."""
    hub_model_id: str | None = None
    """Repository to upload to; None: the name of output_dir."""
    hub_token: str | None = None
    """Access token for the hub; None: the one you are logged in with. It is not written to config.yaml."""

    # ---- names of other scripts --------------------------------------------------------------------------------------
    loss_type: Literal["sigmoid", "hinge", "ipo"] | None = None
    """The name diffusers' SD script has for --objective (sigmoid is dpo)."""
    use_8bit_adam: bool = False
    """The name diffusers' scripts have for --optimizer adamw8bit."""
    enable_xformers_memory_efficient_attention: bool = False
    """The name diffusers' scripts have for --attention xformers."""
    local_rank: int = -1
    """Accepted for old launch lines and without effect: the launcher says the rank."""
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = None
    """Accepted for old launch lines and without effect: there is no prior."""


def resolve(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Fold the scripts' alternative names into ours, fill what follows from other flags, and refuse bad values.

    Returns the configuration and one line for each flag that was accepted without effect.
    """
    notes = []
    settled: dict[str, object] = {"config": None, "local_rank": -1, "prior_generation_precision": None}
    if config.local_rank != -1:
        notes.append("--local_rank does nothing here: the launcher (accelerate, torchrun) says the rank")
    if config.prior_generation_precision is not None:
        notes.append("--prior_generation_precision does nothing here: no prior images are generated")
    if config.loss_type:
        settled |= {"objective": {"sigmoid": "dpo"}.get(config.loss_type, config.loss_type), "loss_type": None}
    if config.use_8bit_adam:
        settled |= {"optimizer": "adamw8bit", "use_8bit_adam": False}
    if config.enable_xformers_memory_efficient_attention:
        settled |= {"attention": "xformers", "enable_xformers_memory_efficient_attention": False}
    if config.mixed_precision is None:
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched not in ("no", "fp16", "bf16"):
            raise BadInput(
                f"accelerate launch --mixed_precision {launched} is not supported: give --mixed_precision no, fp16 or"
                " bf16 to it, or to this command"
            )
        settled["mixed_precision"] = launched
    if config.preference:
        if config.eval_scorers:
            others = (name for name in config.eval_scorers if name != config.preference)
            settled["eval_scorers"] = (config.preference, *others)
        settled |= {"label_column": f"label_{config.preference}", "preference": None}
    if config.beta_dpo is None:
        settled["beta_dpo"] = DEFAULT_BETA.get(str(settled.get("objective", config.objective)), DEFAULT_BETA["dpo"])
    config = dataclasses.replace(config, **settled)
    check(config)
    return config, notes


# Numbers a training run can use; the second column is how the limits read in the error.
_NUMBERS = {
    "rank": (lambda v: v >= 1, "at least 1"),
    "lora_alpha": (lambda v: v > 0, "greater than 0"),
    "ema_decay": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "max_train_samples": (lambda v: v >= 1, "at least 1"),
    "max_bad_fraction": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    "validation_fraction": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "max_token_length": (lambda v: v in TOKEN_LENGTHS, "75, 150 or 225"),
    "resolution": (lambda v: v >= 8, "at least 8 pixels"),
    "proportion_empty_prompts": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    "vae_encode_batch_size": (lambda v: v >= 1, "at least 1"),
    "cached_reference": (lambda v: 1 <= v <= 2**20, "at least 1, the draws a pair, and at most 2^20"),
    "dataloader_num_workers": (lambda v: v >= 0, "0 or more"),
    "beta_dpo": (lambda v: 0 < v <= 1e7, "in (0, 1e7]; published runs use 2000 to 5000 (mapo 0.1)"),
    "label_smoothing": (lambda v: 0 <= v < 0.5, "in [0, 0.5)"),
    "train_batch_size": (lambda v: v >= 1, "at least 1"),
    "gradient_accumulation_steps": (lambda v: v >= 1, "at least 1"),
    "pairs_per_step": (lambda v: v >= 1, "at least 1"),
    "num_train_epochs": (lambda v: v >= 1, "at least 1"),
    "max_train_steps": (lambda v: v >= 1, "at least 1"),
    "learning_rate": (lambda v: 0 < v <= 1, "in (0, 1]; published runs use 1e-8 x pairs a step, or 1e-5 with LoRA"),
    "lr_warmup_steps": (lambda v: v >= 0, "0 or more"),
    "lr_num_cycles": (lambda v: v >= 1, "at least 1"),
    "lr_power": (lambda v: v > 0, "greater than 0"),
    "adam_beta1": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "adam_beta2": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "adam_weight_decay": (lambda v: v >= 0, "0 or more"),
    "adam_epsilon": (lambda v: v > 0, "greater than 0"),
    "max_grad_norm": (lambda v: v >= 0, "0 (do not clip) or more"),
    "max_skipped_updates": (lambda v: v >= 1, "at least 1"),
    "seed": (lambda v: 0 <= v < 2**63, "in [0, 2^63)"),
    "checkpointing_steps": (lambda v: v >= 1, "at least 1"),
    "checkpointing_minutes": (lambda v: v > 0, "greater than 0"),
    "checkpoints_total_limit": (lambda v: v >= 1, "at least 1"),
    "log_every": (lambda v: v >= 1, "at least 1"),
    "validation_steps": (lambda v: v >= 1, "at least 1"),
    "min_timestep": (lambda v: v >= 0, "0 or more"),
    "max_timestep": (lambda v: v >= 1, "at least 1"),
    "sampling_steps": (lambda v: v >= 1, "at least 1"),
    "sampling_guidance": (lambda v: v >= 0, "0 or more"),
    "eval_images": (lambda v: v >= 1, "at least 1"),
    "eval_batch_size": (lambda v: v >= 1, "at least 1"),
    "eval_every": (lambda v: v >= 1, "at least 1"),
    "eval_every_images": (lambda v: v >= 2, "at least 2"),
}


def check(config: TrainConfig) -> None:
    """Refuse values no run can use, naming flag, value and remedy. Raises BadInput."""
    for name, (allowed, reading) in _NUMBERS.items():
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and allowed(value)):
            raise BadInput(f"--{name} ({value}) must be {reading}")
    if config.pretrained_model_name_or_path is None:
        raise BadInput(
            "no model is named: give --pretrained_model_name_or_path (a hub id, a diffusers folder or a .safetensors"
            f" file), or --preset {' | '.join(PRESETS)}"
        )
    if config.dataset_name is None:
        raise BadInput(
            "no preference pairs are named: give --dataset_name (a hub id such as"
            f" {PICKAPIC}, or a local file or folder)"
        )
    if config.objective not in DEFAULT_BETA and ":" not in config.objective:
        raise BadInput(
            f"--objective {config.objective} is not one of {', '.join(DEFAULT_BETA)}; name your own loss as"
            " module:function"
        )
    if config.label_smoothing and config.objective != "cdpo":
        raise BadInput(
            f"--label_smoothing ({config.label_smoothing}) belongs to --objective cdpo, not {config.objective}"
        )
    if "kohya" in (config.export or ()) and config.tuning == "full":
        raise BadInput("--export kohya is the format of a LoRA, and --tuning is full: say --export single_file")
    if config.streaming and config.max_train_steps is None:
        raise BadInput("--streaming needs --max_train_steps: the length of a stream is not known")
    if config.streaming and config.run_validation and not config.validation_prompts:
        raise BadInput("--run_validation with --streaming needs --validation_prompts: no caption is at hand yet")
    if config.streaming and config.validation_fraction:
        raise BadInput(
            "--validation_fraction does not work with --streaming: images shared across captions stay unseen"
        )
    if config.validation_fraction and not config.run_validation:
        raise BadInput(
            f"--validation_fraction ({config.validation_fraction}) holds pairs out that nothing measures:"
            " add --run_validation"
        )
    if bool(config.eval_scorers) != (config.eval_prompts is not None):
        raise BadInput("--eval_scorers and --eval_prompts belong together: name the scorers and a text file of prompts")
    if config.eval_every is not None and not config.eval_scorers:
        raise BadInput(f"--eval_every ({config.eval_every}) needs a scorer: add --eval_scorers and --eval_prompts")
    if config.stop_when_worse and config.eval_every is None:
        raise BadInput("--stop_when_worse needs --eval_every N: how often to look")
    if config.cache and config.random_crop:
        raise BadInput("--random_crop needs --no-cache: the cache holds the centre crop of each image only")
    if config.cached_reference and not config.cache:
        raise BadInput("--cached_reference needs the cache: errors belong to fixed latents; leave out --no-cache")
    if config.overwrite and config.resume_from_checkpoint:
        raise BadInput("--overwrite and --resume_from_checkpoint exclude each other: one deletes what the other needs")
    if config.resume_from_checkpoint == "auto" and config.output_dir is None:
        raise BadInput("--resume_from_checkpoint auto needs --output_dir: without it every start makes a new folder")


# Folded into other flags by `resolve`, or without effect.
_OTHER_NAMES = (
    "loss_type",
    "preference",
    "use_8bit_adam",
    "enable_xformers_memory_efficient_attention",
    "local_rank",
    "prior_generation_precision",
)


def to_yaml(config: TrainConfig) -> str:
    """The configuration as YAML that `--config` reads back; the hub token is left out."""
    return yaml.safe_dump(public(config), sort_keys=False, allow_unicode=True)


def public(config: TrainConfig) -> dict[str, object]:
    """The configuration as plain JSON/YAML values, without the hub token and the flags that only steer a parse."""
    hidden = {"hub_token", "config", "dry_run", *_OTHER_NAMES}
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in hidden}
    return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in values.items()}
