"""What the records of a store depend on, and their layout."""

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

KEY_BYTES = 16  # length of a key: a hash of what the record was computed from
FORMAT = 1  # version of the shards and indices on disk
DTYPES = ("float16", "float32", "float64")


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
class Remedies:
    """The remedies that a store's error messages suggest."""

    flag: str = "--output_dir"  # names the folder of stores
    name: str = "the folder"  # what that folder is called
    unwritable: str = "name another --output_dir"  # for a folder that cannot be written
    damaged: str = "delete the shard, and the same command makes it again"  # for a damaged record; {root} is the folder
    lost: str = "the same command makes it again"  # for a shard that cannot be used


DEFAULT_REMEDIES = Remedies()


@dataclass(frozen=True)
class Recipe:
    """How entries of one kind were made. Entries of different recipes live in different folders."""

    kind: str  # "latents", "text", a scorer's name: the folder's name begins with it
    facts: dict[str, Any]  # JSON values: weights, resolution, dtype and whatever else the values depend on
    fields: tuple[Field, ...]  # a record is these tensors end to end
    remedies: Remedies = field(default=DEFAULT_REMEDIES, compare=False, repr=False)

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
        """The contents of recipe.json."""
        fields = [{"name": f.name, "shape": list(f.shape), "dtype": f.dtype} for f in self.fields]
        return {"format": FORMAT, "kind": self.kind, "facts": self.facts, "fields": fields}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Recipe":
        """Parse the contents of a recipe.json. Raises ValueError unless they are a recipe of this format."""
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
        """List how another recipe.json differs from this, as `name: here -> there`."""
        return changes(_flat(self.as_json()), _flat(other))


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List what differs between two flat dictionaries, as `name: before -> now`."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name}: {before.get(name)} -> {now.get(name)}" for name in names]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat = {}
    for name, part in value.items():
        flat |= _flat(part, f"{prefix}.{name}" if prefix else str(name))
    return flat
