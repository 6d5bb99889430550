"""Images in files, decoded on access."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dpo_fast.checksums import png_is_whole
from dpo_fast.data.images import BadImage, decode
from dpo_fast.errors import BadInput
from dpo_fast.files import read_bytes

THREADS = 4  # for reading and decoding


class Files:
    """Images read on access: uint8 [3,H,W], upright and over white. Raises BadInput for one that cannot be read."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Tensor:
        path = self.paths[row]
        try:
            data = read_bytes(path)
            if png_is_whole(data) is False:  # dpo_fast wrote it, and it has changed since
                raise BadImage("is damaged (its bytes do not agree with its checksum)")
            pixels = np.array(decode(data))
        except (OSError, BadImage) as error:
            raise BadInput(f"{path} {error}: mend it, or take it away") from error
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def check(self, title: str) -> None:
        """Decode every image once, with a progress bar. Raises BadInput for the first that cannot be read."""
        distinct = Files(list(dict.fromkeys(self.paths)))
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in tqdm(pool.map(distinct._open, range(len(distinct))), title, len(distinct), unit=" images"):
                pass

    def _open(self, row: int) -> None:
        self[row]
