"""open_clip's CLIP and ImageReward's BLIP written out plainly, with the names of their published files.

They share no code with transformers, which the scorers are built on.
"""

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import Tensor, nn


class OpenClip(nn.Module):
    """open_clip's CLIP with a ViT."""

    def __init__(
        self, embed: int, image: int, patch: int, vision: tuple[int, int, int], text: tuple[int, int, int, int]
    ):
        """vision: width, layers, heads. text: vocabulary, width, layers, heads."""
        super().__init__()
        vocabulary, width, layers, heads = text
        self.visual = _ClipVision(embed, image, patch, *vision)
        self.transformer = _ClipTransformer(width, layers, heads)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(77, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed))
        self.logit_scale = nn.Parameter(torch.empty([]))

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of unit length of [B,3,H,W] and of tokens [B,77], whose largest one is the end of the text."""
        hidden = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        later = torch.full((tokens.shape[1],) * 2, -torch.inf, dtype=hidden.dtype).triu(1)
        hidden = self.ln_final(self.transformer(hidden, later))
        texts = hidden[torch.arange(len(tokens)), tokens.argmax(1)] @ self.text_projection
        images = self.visual(pixels)
        return images / images.norm(dim=1, keepdim=True), texts / texts.norm(dim=1, keepdim=True)


class _ClipVision(nn.Module):
    def __init__(self, embed: int, image: int, patch: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((image // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = _ClipTransformer(width, layers, heads)
        self.proj = nn.Parameter(torch.empty(width, embed))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).mT
        hidden = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(hidden))[:, 0]) @ self.proj


class _ClipTransformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_ClipBlock(width, heads) for _ in range(layers))

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            hidden = block(hidden, mask)
        return hidden


class _ClipBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.ln_1(hidden)
        hidden = hidden + self.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return hidden + self.mlp(self.ln_2(hidden))


class PlainImageReward(nn.Module):
    """ImageReward without its normalisation."""

    def __init__(self, image: int, patch: int, vision: tuple[int, int, int], text: tuple[int, int, int, int]) -> None:
        """vision: width, layers, heads. text: vocabulary, width, layers, heads."""
        super().__init__()
        self.blip = nn.Module()
        self.blip.visual_encoder = _BlipVision(image, patch, *vision)
        self.blip.text_encoder = _Bert(*text, seen=vision[0])
        self.blip.vision_proj, self.blip.text_proj = nn.Linear(vision[0], 256), nn.Linear(text[1], 256)
        self.mlp = nn.Module()
        self.mlp.layers = plain_head(text[1])

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        read = self.blip.text_encoder(tokens, mask, self.blip.visual_encoder(pixels))
        return self.mlp.layers(read[:, 0])[:, 0]


def plain_head(width: int) -> nn.Sequential:
    """The head of ImageReward and of the aesthetic predictor, for evaluation: what they drop in training is nothing."""
    widths = [width, 1024, 128, 64, 16, 1]
    linear = [nn.Linear(a, b) for a, b in pairwise(widths)]
    return nn.Sequential(linear[0], nn.Identity(), linear[1], nn.Identity(), linear[2], nn.Identity(), *linear[3:])


class _BlipVision(nn.Module):
    def __init__(self, image: int, patch: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, (image // patch) ** 2 + 1, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.ModuleList(_BlipBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed.proj(pixels).flatten(2).mT
        hidden = torch.cat([self.cls_token.expand(len(pixels), 1, -1), patches], 1) + self.pos_embed
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)


class _BlipBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.attn.qkv(self.norm1(hidden)).chunk(3, dim=-1)
        hidden = hidden + self.attn.proj(_attend(query, key, value, self.heads))
        return hidden + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(hidden))))


class _Bert(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, seen: int) -> None:
        super().__init__()
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(vocabulary, width)
        self.embeddings.position_embeddings = nn.Embedding(512, width)
        self.embeddings.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.embeddings.register_buffer("position_ids", torch.arange(512)[None])  # is in the published file
        self.encoder.layer = nn.ModuleList(_BertLayer(width, heads, seen) for _ in range(layers))

    def forward(self, tokens: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        positions = self.embeddings.position_embeddings.weight[: tokens.shape[1]]
        hidden = self.embeddings.LayerNorm(self.embeddings.word_embeddings(tokens) + positions)
        for layer in self.encoder.layer:
            hidden = layer(hidden, mask, seen)
        return hidden


class _BertLayer(nn.Module):
    def __init__(self, width: int, heads: int, seen: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention, self.crossattention = _bert_attention(width, width), _bert_attention(width, seen)
        self.intermediate, self.output = nn.Module(), _bert_output(4 * width, width)
        self.intermediate.dense = nn.Linear(width, 4 * width)

    def forward(self, hidden: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        hidden = self._attend(self.attention, hidden, hidden, (1 - mask[:, None, None, :].to(hidden.dtype)) * -10000)
        hidden = self._attend(self.crossattention, hidden, seen, None)
        wide = nn.functional.gelu(self.intermediate.dense(hidden))
        return self.output.LayerNorm(self.output.dense(wide) + hidden)

    def _attend(self, part: nn.Module, hidden: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
        own = part.self
        mixed = _attend(own.query(hidden), own.key(other), own.value(other), self.heads, mask)
        return part.output.LayerNorm(part.output.dense(mixed) + hidden)


def _bert_attention(width: int, seen: int) -> nn.Module:
    part, own = nn.Module(), nn.Module()
    own.query, own.key, own.value = nn.Linear(width, width), nn.Linear(seen, width), nn.Linear(seen, width)
    part.add_module("self", own)
    part.output = _bert_output(width, width)
    return part


def _bert_output(wide: int, width: int) -> nn.Module:
    part = nn.Module()
    part.dense, part.LayerNorm = nn.Linear(wide, width), nn.LayerNorm(width, eps=1e-12)
    return part


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    weights = query @ key.mT / query.shape[-1] ** 0.5
    weights = (weights if mask is None else weights + mask).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)
