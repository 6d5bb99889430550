"""Read a model's tokenizers without its weights, for what a dry run says of captions."""

from pathlib import Path

import transformers
from huggingface_hub import snapshot_download

from dpo_fast.models.caption_limits import Limit
from dpo_fast.models.kinds import index
from dpo_fast.models.load import component_config, config_source, family_of
from dpo_fast.models.load_errors import bad_input
from dpo_fast.models.source import ModelSource
from dpo_fast.models.untrusted import INDEX, check_pipeline


def caption_limits(source: ModelSource) -> list[Limit]:
    """Return what the model's tokenizers and text encoders take of a caption, as its `Family` does.

    Raises BadInput for a tokenizer that cannot be read.
    """
    family, path, hub = family_of(source), source.path, source.hub()
    if path.endswith(".safetensors"):
        path, hub["revision"] = config_source(path, source.single_file_config), None
    with bad_input(f"the tokenizer of {path} cannot be read", "name a whole diffusers pipeline"):
        folder = Path(path)
        if not folder.is_dir():
            folder = Path(snapshot_download(path, allow_patterns=[INDEX, "tokenizer*/*"], **hub))
        check_pipeline(folder)
        parts, limits = index(str(folder), hub), []
        for encoder in family.text_encoders:
            name = encoder.replace("text_encoder", "tokenizer")
            tokenizer = getattr(transformers, parts[name][1]).from_pretrained(folder / name)
            positions = component_config(source, encoder).get("max_position_embeddings")
            limits.append(Limit.of(tokenizer, positions, source.max_token_length))
    return limits
