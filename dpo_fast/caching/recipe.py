"""What identifies a cached entry: the item itself (image bytes or caption) and how it was encoded."""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_fast.data.images import KEY_BYTES

FORMAT = 1  # of shards and indices on disk
DTYPES = ("float16", "float32")


def caption_key(caption: str) -> bytes:
    """The name of a caption: KEY_BYTES."""
    return hashlib.blake2b(caption.encode(), digest_size=KEY_BYTES).digest()


def mirrored(key: bytes) -> bytes:
    """The name of an image's mirror image."""
    return hashlib.blake2b(key, digest_size=KEY_BYTES, person=b"mirrored").digest()


@dataclass(frozen=True)
class Field:
    """One tensor of a record."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float16"

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Recipe:
    """How entries of one kind were made. Entries of different recipes live in different folders."""

    kind: str  # "latents", "text": the folder's name begins with it
    facts: dict[str, Any]  # JSON values: weights, resolution, dtype and whatever else the values depend on
    fields: tuple[Field, ...]  # a record is these tensors end to end

    @property
    def record_bytes(self) -> int:
        return sum(field.nbytes for field in self.fields)

    @property
    def digest(self) -> str:
        return hashlib.blake2b(json.dumps(self.as_json(), sort_keys=True).encode(), digest_size=8).hexdigest()

    @property
    def folder_name(self) -> str:
        return f"{self.kind}-{self.digest}"

    def as_json(self) -> dict[str, Any]:
        """What recipe.json holds."""
        fields = [{"name": f.name, "shape": list(f.shape), "dtype": f.dtype} for f in self.fields]
        return {"format": FORMAT, "kind": self.kind, "facts": self.facts, "fields": fields}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Recipe":
        """Raises ValueError for what is not a recipe of this format."""
        try:
            if value["format"] != FORMAT:
                raise ValueError(f"it has format {value['format']!r:.50}, this version reads {FORMAT}")
            fields = tuple(Field(f["name"], tuple(f["shape"]), f["dtype"]) for f in value["fields"])
            sizes = [size for field in fields for size in field.shape]
            if (
                not fields
                or any(field.dtype not in DTYPES or not isinstance(field.name, str) for field in fields)
                or any(type(size) is not int or not 0 < size < 2**31 for size in sizes)
                or sum(math.prod(field.shape) for field in fields) >= 2**31
            ):
                raise ValueError(f"its fields are {value['fields']!r:.200}")
            if not isinstance(value["kind"], str):
                raise ValueError(f"its kind is {value['kind']!r:.200}")
            return Recipe(value["kind"], dict(value["facts"]), fields)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"it is not a recipe ({type(error).__name__}: {error})") from error

    def differences(self, other: dict[str, Any]) -> list[str]:
        """What another recipe.json has otherwise, as `name: here -> there`."""
        here, there = _flat(self.as_json()), _flat(other)
        names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
        return [f"{name}: {here.get(name)} -> {there.get(name)}" for name in names]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat = {}
    for name, part in value.items():
        flat |= _flat(part, f"{prefix}.{name}" if prefix else str(name))
    return flat
