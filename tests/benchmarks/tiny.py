"""Cases of the step benchmark that take seconds."""

from dataclasses import replace

from benchmarks.step.cases import CASES, Case, Model

_TEXT = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    projection_dim=16,
    vocab_size=514,
    bos_token_id=512,
    eos_token_id=513,
)
_VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(8, 8, 16, 16),
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=64,
    scaling_factor=0.18215,
)
_UNET = dict(
    sample_size=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(16, 32),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=16,
    norm_num_groups=4,
)
_SDXL = dict(
    _UNET,
    cross_attention_dim=32,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=16 + 6 * 8,
)


def case(family: str, tuning: str) -> Case:
    """A case of two levels, known by its name in CASES while `monkeypatch` has it there."""
    sd15 = family == "sd15"
    model = Model(family, _UNET if sd15 else _SDXL, _VAE, (_TEXT,) if sd15 else (_TEXT, _TEXT))
    like = CASES["mini-sd15-512-lora"]
    rate = 3e-3 if tuning == "lora" else 1e-4
    return replace(
        like,
        name=f"tiny-{family}-{tuning}",
        model=model,
        resolution=64,
        tuning=tuning,
        pairs=2,
        batch_size=2,
        learning_rate=rate,
    )
