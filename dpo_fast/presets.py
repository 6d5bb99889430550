"""Default betas of the objectives, and the presets: one row for each `--preset NAME`."""

from pathlib import Path

# The objectives (`objectives.OBJECTIVES`) and their default betas, in our unit.
DEFAULT_BETA = {
    "dpo": 5000.0,
    "ipo": 5000.0,
    "hinge": 5000.0,
    "cdpo": 5000.0,
    "kto": 5000.0,
    "mapo": 0.1,
    "sft": 5000.0,
}

PICKAPIC = "yuvalkirstain/pickapic_v2"
SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
SDXL_VAE_FP16 = "madebyollin/sdxl-vae-fp16-fix"

# What a full run of the paper's authors uses (their launch scripts, not the formula in the paper: the two differ
# 2500-fold in the learning rate, and the launch scripts are what made the published weights).
_PUBLISHED_FULL = dict(
    tuning="full",
    dataset_name=PICKAPIC,
    beta_dpo=5000.0,
    learning_rate=1e-8,
    scale_lr=True,
    pairs_per_step=2048,
    lr_scheduler="constant_with_warmup",
    max_train_steps=2000,
    mixed_precision="fp16",
)
# The LoRA recipe of diffusers' README for SDXL and SDXL-Turbo.
_PUBLISHED_LORA = dict(
    pretrained_vae_model_name_or_path=SDXL_VAE_FP16,
    dataset_name=PICKAPIC,
    beta_dpo=5000.0,
    learning_rate=1e-5,
    rank=8,
    train_batch_size=8,
    gradient_accumulation_steps=2,
    lr_scheduler="constant",
    lr_warmup_steps=0,
    max_train_steps=2000,
    mixed_precision="fp16",
)
_SHAPES = Path(__file__).parent / "shapes"
PRESETS: dict[str, dict[str, object]] = {
    # The built-in world: everything is in the package, two cores are enough.
    "shapes": dict(
        pretrained_model_name_or_path=str(_SHAPES / "pipeline"),
        dataset_name=str(_SHAPES / "pairs.parquet"),
        label_column="label_quality",
        resolution=16,
        # Chosen by the runs in docs/alignment.md.
        tuning="full",
        beta_dpo=2000.0,
        learning_rate=3e-5,
        lr_scheduler="cosine",
        lr_warmup_steps=0,
        train_batch_size=24,
        max_train_steps=160,
        seed=0,  # so that the first run is the one that docs/alignment.md shows
        min_timestep=200,
        dataloader_num_workers=0,
        sampling_steps=10,
        sampling_guidance=3.0,
        eval_scorers=("quality", "faithfulness", "right", "appeal"),
        eval_prompts=_SHAPES / "held_out.txt",
        eval_images=512,
        eval_batch_size=64,
    ),
    "sd15": dict(
        _PUBLISHED_FULL,
        pretrained_model_name_or_path="stable-diffusion-v1-5/stable-diffusion-v1-5",
        resolution=512,
        lr_warmup_steps=500,
        proportion_empty_prompts=0.2,
    ),
    "sdxl": dict(
        _PUBLISHED_FULL,
        pretrained_model_name_or_path=SDXL_BASE,
        resolution=1024,
        train_batch_size=1,  # 47 GiB without computing anything twice
        optimizer="adafactor",
        lr_warmup_steps=200,
        proportion_empty_prompts=0.2,
    ),
    "sdxl-lora": dict(
        _PUBLISHED_LORA,
        pretrained_model_name_or_path=SDXL_BASE,
        resolution=1024,
        train_batch_size=4,  # 47 GiB; the recipe's 16 pairs a step all the same
        gradient_accumulation_steps=4,
    ),
    "turbo": dict(
        _PUBLISHED_LORA,
        pretrained_model_name_or_path="stabilityai/sdxl-turbo",
        is_turbo=True,
        resolution=512,
    ),
}
