"""The cases of the step benchmark: the public models' architectures, and the same at a tenth of the width.

In the `mini-` cases the UNet has a tenth of the channels of the public one and the same layers; resolution, VAE and
text widths are chosen so that a pair's FLOPs keep the proportions of the real case (within `PROPORTION_TOLERANCE`,
checked in tests/benchmarks). Not everything shrinks by ten: heads keep about their size (there are fewer of them), norm
groups keep about their number of channels, prompts keep their 77 tokens, and the vocabulary is small.
"""

from dataclasses import dataclass

PROPORTION_TOLERANCE = 0.3  # of the FLOP ratios VAE : UNet and text : UNet, mini against real
TOKENS = 77
RANK = 8  # of the LoRA cases, on to_q, to_k, to_v, to_out.0, as in the public script

_SCHEDULE = dict(num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


@dataclass(frozen=True)
class Model:
    """Configurations as diffusers and transformers take them."""

    family: str  # sd15 or sdxl
    unet: dict
    vae: dict
    text: tuple[dict, ...]  # one encoder, or two


@dataclass(frozen=True)
class Case:
    """What one run measures."""

    name: str
    model: Model
    resolution: int  # pixels
    tuning: str  # lora or full
    turbo: bool
    pairs: int  # per optimizer step, for every provider
    batch_size: int  # pairs per forward pass, for ours and tuned
    learning_rate: float  # large: after five updates the margins must show what was trained on

    @property
    def latent_side(self) -> int:
        return self.resolution // 2 ** (len(self.model.vae["block_out_channels"]) - 1)

    @property
    def mini(self) -> bool:
        return self.name.startswith("mini-")


def _unet_sd15(width: int, heads: int, groups: int, text: int, side: int) -> dict:
    cross = "CrossAttn"
    return dict(
        sample_size=side,
        down_block_types=(*[f"{cross}DownBlock2D"] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *[f"{cross}UpBlock2D"] * 3),
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        layers_per_block=2,
        attention_head_dim=heads,  # diffusers' name for the number of heads
        cross_attention_dim=text,
        norm_num_groups=groups,
    )


def _unet_sdxl(width: int, heads: tuple, groups: int, text: tuple[int, int], time: int, side: int) -> dict:
    return dict(
        sample_size=side,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(width, 2 * width, 4 * width),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=heads,
        cross_attention_dim=sum(text),
        norm_num_groups=groups,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time,
        projection_class_embeddings_input_dim=text[1] + 6 * time,
    )


def _vae(width: int, groups: int, scaling_factor: float, side: int) -> dict:
    return dict(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        layers_per_block=2,
        norm_num_groups=groups,
        latent_channels=4,
        sample_size=side,
        scaling_factor=scaling_factor,
    )


def _clip(width: int, layers: int, heads: int, act: str, vocabulary: int) -> dict:
    return dict(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        hidden_act=act,
        vocab_size=vocabulary,
        max_position_embeddings=TOKENS,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )


def _sd15(side: int) -> Model:
    """stable-diffusion-v1-5: UNet, VAE and CLIP ViT-L/14."""
    text = _clip(768, 12, 12, "quick_gelu", 49408)
    return Model("sd15", _unet_sd15(320, 8, 32, 768, side), _vae(128, 32, 0.18215, 512), (text,))


def _sdxl(side: int) -> Model:
    """stable-diffusion-xl-base-1.0 (and sdxl-turbo, side 64): UNet, VAE, CLIP ViT-L/14 and OpenCLIP bigG/14."""
    text = (_clip(768, 12, 12, "quick_gelu", 49408), _clip(1280, 32, 20, "gelu", 49408))
    return Model("sdxl", _unet_sdxl(320, (5, 10, 20), 32, (768, 1280), 256, side), _vae(128, 32, 0.13025, 1024), text)


def _mini_sd15(side: int) -> Model:
    text = _clip(28, 12, 2, "quick_gelu", 514)
    return Model("sd15", _unet_sd15(32, 1, 8, 28, side), _vae(13, 1, 0.18215, 8 * side), (text,))


def _mini_sdxl(side: int) -> Model:
    text = (_clip(24, 12, 1, "quick_gelu", 514), _clip(40, 32, 2, "gelu", 514))
    unet = _unet_sdxl(32, (1, 1, 2), 8, (24, 40), 26, side)
    return Model("sdxl", unet, _vae(12, 4, 0.13025, 8 * side), text)


def _with_minis(*cases: Case) -> dict[str, Case]:
    # At a tenth of the width, attention keeps its share of the FLOPs at a tenth of the pixels: sides 3.2 times shorter.
    minis = {1024: 320, 512: 160}
    table = {}
    for case in cases:
        side = minis[case.resolution]
        if case.model.family == "sd15":
            side = 192  # its resolutions are multiples of 64
        model = (_mini_sd15 if case.model.family == "sd15" else _mini_sdxl)(side // 8)
        pairs = 4 if side < 320 else 2
        mini = Case(f"mini-{case.name}", model, side, case.tuning, case.turbo, pairs, pairs, MINI_RATES[case.tuning])
        table |= {case.name: case, mini.name: mini}
    return table


MINI_RATES = {"lora": 1e-3, "full": 1e-5}
CASES = _with_minis(
    Case("sdxl-1024-full", _sdxl(128), 1024, "full", False, pairs=4, batch_size=1, learning_rate=3e-6),
    Case("sdxl-1024-lora", _sdxl(128), 1024, "lora", False, pairs=4, batch_size=4, learning_rate=3e-4),
    Case("turbo-512-full", _sdxl(64), 512, "full", True, pairs=8, batch_size=4, learning_rate=3e-6),
    Case("turbo-512-lora", _sdxl(64), 512, "lora", True, pairs=8, batch_size=8, learning_rate=3e-4),
    Case("sd15-512-full", _sd15(64), 512, "full", False, pairs=16, batch_size=16, learning_rate=3e-6),
    Case("sd15-512-lora", _sd15(64), 512, "lora", False, pairs=16, batch_size=16, learning_rate=3e-4),
)


def scheduler_config(case: Case) -> dict:
    """Return the noise schedule, which all three models share; for Turbo, callers rescale it to zero terminal SNR."""
    return dict(_SCHEDULE, steps_offset=1, prediction_type="epsilon")
