"""The models that can be trained: loading, encoding, one UNet call for both images of a pair, adapters, saving."""

from dpo_fast.models.attention import ATTENTIONS, set_attention, usable_attention
from dpo_fast.models.checkpointing import recompute_activations
from dpo_fast.models.compiling import check_compiler, compile_unet, compiles, not_compiled, programs_made
from dpo_fast.models.family import COMPUTE_DTYPES, Conditioning, Family, nonfinite_rows, nonfinite_tensors
from dpo_fast.models.fingerprints import latents_recipe_facts, reference_recipe_facts, text_recipe_facts
from dpo_fast.models.load import load_family, revisions
from dpo_fast.models.lora import DEFAULT_TARGETS, AdapterSwitch, add_lora, save_lora
from dpo_fast.models.merging import merge_lora

__all__ = [
    "ATTENTIONS",
    "COMPUTE_DTYPES",
    "DEFAULT_TARGETS",
    "AdapterSwitch",
    "Conditioning",
    "Family",
    "add_lora",
    "check_compiler",
    "compile_unet",
    "compiles",
    "latents_recipe_facts",
    "load_family",
    "merge_lora",
    "nonfinite_rows",
    "nonfinite_tensors",
    "not_compiled",
    "programs_made",
    "recompute_activations",
    "reference_recipe_facts",
    "revisions",
    "save_lora",
    "set_attention",
    "text_recipe_facts",
    "usable_attention",
]
