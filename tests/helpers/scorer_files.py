"""The files of the published scorers, as their repositories have them, of tiny models with random weights."""

import json
import tempfile
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn
from transformers import BertTokenizer, BlipVisionConfig, CLIPConfig, CLIPModel

from dpo_fast.scorers import aesthetic, hpsv2, imagereward, pickscore
from dpo_fast.scorers.clip_models import VIT_H, VIT_L
from tests.helpers.pipelines import randomise, tokenizer
from tests.helpers.plain_models import OpenClip, PlainImageReward, plain_head

SIZE, PATCH = 28, 7  # pixels, instead of 224 and 14 or 16
EMBED = 24
VISION, TEXT = (32, 2, 4), (514, 48, 2, 4)  # width, layers, heads; before them the vocabulary of the test tokenizer


def clip_config(hidden_act: str) -> CLIPConfig:
    """transformers' configuration of the tiny model; eos_token_id 2 is that of the published files."""
    vocabulary, width, layers, heads = TEXT
    common = {"hidden_act": hidden_act, "projection_dim": EMBED}
    return CLIPConfig(
        projection_dim=EMBED,
        text_config={
            **common,
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        vision_config={
            **common,
            "hidden_size": VISION[0],
            "intermediate_size": 4 * VISION[0],
            "num_hidden_layers": VISION[1],
            "num_attention_heads": VISION[2],
            "image_size": SIZE,
            "patch_size": PATCH,
        },
    )


def small_vision() -> BlipVisionConfig:
    """ImageReward's configuration of BLIP's ViT with smaller numbers."""
    width, layers, heads = VISION
    config = deepcopy(imagereward.VISION)
    config.hidden_size, config.intermediate_size = width, 4 * width
    config.num_hidden_layers, config.num_attention_heads = layers, heads
    config.image_size, config.patch_size = SIZE, PATCH
    return config


def write_all(folder: Path) -> dict[str, nn.Module]:
    """Write every scorer's repositories into `folder`; return the models by the name of the scorer, in fp64."""
    models: dict[str, nn.Module] = {}
    for seed, (name, repository, act) in enumerate(
        [("pickscore", pickscore.REPOSITORY, "gelu"), ("clip", VIT_L, "quick_gelu")]
    ):
        models[name] = CLIPModel(clip_config(act))
        randomise(models[name], seed)
        models[name].save_pretrained(folder / repository)
    clip_config("gelu").save_pretrained(folder / VIT_H)
    for repository in (VIT_H, VIT_L):
        tokenizer("<|endoftext|>").save_pretrained(folder / repository)

    (folder / hpsv2.REPOSITORY).mkdir(parents=True)
    for seed, (name, file) in enumerate(hpsv2.FILES.items(), 10):
        models[name] = OpenClip(EMBED, SIZE, PATCH, VISION, TEXT)
        randomise(models[name], seed)
        half = {key: tensor.half() for key, tensor in models[name].state_dict().items()}  # as in the "compressed" files
        models[name].load_state_dict(half)
        torch.save({"state_dict": half}, folder / hpsv2.REPOSITORY / file)

    models["aesthetic"] = nn.Module()
    models["aesthetic"].layers = plain_head(EMBED)
    randomise(models["aesthetic"], 20)
    (folder / aesthetic.REPOSITORY).mkdir(parents=True)
    torch.save(models["aesthetic"].state_dict(), folder / aesthetic.REPOSITORY / aesthetic.FILE)

    bert = bert_tokenizer()
    models["imagereward"] = PlainImageReward(SIZE, PATCH, VISION, (len(bert) + 2, *TEXT[1:]))
    randomise(models["imagereward"], 30)
    with torch.no_grad():  # so little that the epsilon of the first norm counts
        encoder = models["imagereward"].blip.visual_encoder
        for parameter in (encoder.cls_token, encoder.pos_embed, *encoder.patch_embed.parameters()):
            parameter.mul_(1e-3)
    (folder / imagereward.REPOSITORY).mkdir(parents=True)
    torch.save(models["imagereward"].state_dict(), folder / imagereward.REPOSITORY / "ImageReward.pt")
    config = {  # the keys of BLIP's configs/med_config.json
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": TEXT[1],
        "initializer_range": 0.02,
        "intermediate_size": 4 * TEXT[1],
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": TEXT[3],
        "num_hidden_layers": TEXT[2],
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": len(bert) + 2,
        "encoder_width": 768,
        "add_cross_attention": True,
    }
    (folder / imagereward.REPOSITORY / "med_config.json").write_text(json.dumps(config))
    bert.save_pretrained(folder / imagereward.TOKENIZER)
    return {name: model.double().eval().requires_grad_(False) for name, model in models.items()}


def bert_tokenizer() -> BertTokenizer:
    """A BERT tokenizer whose words are single letters."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.txt").write_text("\n".join(words) + "\n")
        return BertTokenizer.from_pretrained(folder, model_max_length=512)
