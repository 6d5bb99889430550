"""What diffusers and transformers print that asks nothing of the user: filtered by logger and text, only here."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_NOT_FOR_USERS = {  # logger: part of the message
    "transformers.utils.import_utils": "requires torchvision",  # the image processors are not used
    "transformers.tokenization_utils_base": "Token indices sequence length is longer",  # pipelines cut it themselves
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion": "truncated because CLIP",  # a line a prompt
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl": "truncated because CLIP",
    "diffusers.models.modeling_utils": "kept in float32: []",  # an empty list of modules
}


def _without(text: str):
    return lambda record: text not in record.getMessage()


for _logger, _text in _NOT_FOR_USERS.items():
    logging.getLogger(_logger).addFilter(_without(_text))


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Hide the progress bars of reading files from the disk; download bars stay if the download happens outside."""
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
