"""The models that can be trained: loading, encoding, one UNet call for both images of a pair, adapters, saving."""

from dpo_fast.models.attention import ATTENTIONS, set_attention, usable_attention
from dpo_fast.models.encoding import image_encoding, prediction, text_encoding
from dpo_fast.models.family import COMPUTE_DTYPES, Conditioning, Family, nonfinite_rows
from dpo_fast.models.load import load_family
from dpo_fast.models.lora import DEFAULT_TARGETS, adapter_off, add_lora, merge_lora, save_lora

__all__ = [
    "ATTENTIONS",
    "COMPUTE_DTYPES",
    "DEFAULT_TARGETS",
    "Conditioning",
    "Family",
    "adapter_off",
    "add_lora",
    "image_encoding",
    "load_family",
    "merge_lora",
    "nonfinite_rows",
    "prediction",
    "save_lora",
    "set_attention",
    "text_encoding",
    "usable_attention",
]
