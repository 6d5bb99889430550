"""Filters for the noise that diffusers and transformers print, by logger and text; there are no others."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_NOT_FOR_USERS = (  # logger, part of the message
    ("transformers.utils.import_utils", "requires torchvision"),  # the image processors are not used
    ("transformers.tokenization_utils_base", "Token indices sequence length is longer"),  # the pipelines truncate it
    ("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "truncated because CLIP"),  # one line per prompt
    ("diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl", "truncated because CLIP"),
    ("diffusers.models.modeling_utils", "kept in float32: []"),  # an empty list of modules
    ("diffusers.models.modeling_utils", "An error occurred while trying to fetch"),  # also raised
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),  # 4-bit weights are not used
    ("diffusers.loaders.peft", "was unsuccessful with the following error"),  # also raised
    ("diffusers.loaders.peft", "No LoRA keys associated"),  # merge_lora raises
    ("diffusers.loaders.lora_base", "No LoRA keys associated"),  # in the text encoders, as intended
)
_WARNINGS_NOT_FOR_USERS = (  # start of the message
    "The `local_dir_use_symlinks` argument is deprecated",  # diffusers' use of the hub
    "While injecting the PEFT adapters, an inconsistency",  # a LoRA without some of its target modules
)


def _without(text: str):
    return lambda record: text not in record.getMessage()


for _logger, _text in _NOT_FOR_USERS:
    logging.getLogger(_logger).addFilter(_without(_text))
for _text in _WARNINGS_NOT_FOR_USERS:
    warnings.filterwarnings("ignore", message=re.escape(_text))


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Hide the progress bars for reading files from disk; for download bars to stay, download outside the block."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [lib for lib in (diffusers_logging, transformers_logging) if lib.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
