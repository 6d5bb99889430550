"""Build the cache: read and encode every distinct image and caption of the needed pairs once.

A build makes one pass over the rows in order: threads read, hash and decode ahead, the VAE encodes, and a writer
appends. With several ranks, each rank goes over all rows and encodes every world_size-th distinct item. Cached items
are neither read nor encoded again. A process killed at any moment loses only the items it was working on, and the next
build ends with the same files as one that was never killed.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from dpo_fast.caching.manifest import STREAM_FORMAT, Manifest, RememberedSource, keys_of, read_images
from dpo_fast.caching.needed import NeededRows, Row, first_bad, is_usable, known_rows
from dpo_fast.caching.reader import CachedItems
from dpo_fast.caching.recipe import cache_recipe, caption_key, mirrored, remedies
from dpo_fast.caching.settings import CacheSettings
from dpo_fast.caching.stages import disk_errors_as_bad_input, stage_on_all_ranks
from dpo_fast.data.images import (
    RULE,
    BadImage,
    ImageKey,
    Keys,
    TooThin,
    crop_corner,
    mirror,
    scaled,
    to_pixels,
)
from dpo_fast.data.pairs import too_many_bad
from dpo_fast.data.pairs_source import PairsSource
from dpo_fast.data.sources import BadRow, StreamedRow, StreamedSource
from dpo_fast.errors import BadInput
from dpo_fast.files import human_bytes, remove_temporaries
from dpo_fast.models import Family, latents_recipe_facts, nonfinite_rows, text_recipe_facts
from dpo_fast.parallel import Ranks
from dpo_fast.store import (
    Field,
    Recipe,
    Store,
    Writer,
    begin_folder,
    drop_damaged,
    finish_orphans,
    locked,
    log_keys,
    tidy,
)
from dpo_fast.threads import ahead, groups

PART_ROWS = 16384  # rows hashed between two writes of the manifest
PROMPTS_A_CALL = 64  # captions per call of the text encoders on a GPU
ROWS_AHEAD = 64  # read and hashed before they are needed


@dataclass
class Counts:
    """What a build found and did, over all ranks."""

    image_uses: int = 0  # two per pair
    images: int = 0  # distinct ones
    images_encoded: int = 0  # records: with --hflip two per image
    captions: int = 0
    prompts: int = 0  # distinct ones
    prompts_encoded: int = 0


class Cached(NamedTuple):
    """A complete cache for some pairs."""

    latents: CachedItems
    text: CachedItems
    counts: Counts


class _Unit(NamedTuple):
    """A distinct image to encode, in the orientations that are missing."""

    row: int  # the first row that has it, and the column
    column: str
    data: bytes | BadImage
    keys: list[tuple[bytes, bool]]  # (key of the record, mirrored)


def manifest_of(root: Path, pairs: PairsSource, stamp: str) -> Manifest:
    """Load the manifest of `pairs` from the cache folder; `stamp` identifies the state of their files."""
    asked = [
        Path(pairs.name).name if stamp else pairs.name,
        pairs.config_name,
        pairs.split,
        pairs.image_columns,
        pairs.label_column,
        pairs.caption_column,
        pairs.streaming,
        pairs.max_rows,
        stamp,
    ]
    if pairs.streaming:
        asked.append(STREAM_FORMAT)
    return Manifest(root / f"pairs-{blake2b(repr(asked).encode(), digest_size=8).hexdigest()}")


def recipes(resolution: int, family: Family) -> tuple[Recipe, Recipe]:
    """The recipes of this run's latents and prompt embeddings."""
    facts = {"resolution": resolution, "images": RULE, **latents_recipe_facts(family)}
    latents = cache_recipe("latents", facts, (Field("latents", family.latent_shape(resolution)),))
    fields = tuple(Field(name, tuple(tensor.shape[1:])) for name, tensor in family.empty_prompt().items())
    return latents, cache_recipe("text", text_recipe_facts(family), fields)


def fill(
    settings: CacheSettings,
    ranks: Ranks,
    source: RememberedSource | StreamedSource | None,  # None: a stream whose rows the manifest knows
    manifest: Manifest,
    wanted: NeededRows,
    family: Family,
    *,
    reopen: Callable[[], StreamedSource],
    repair: bool = False,
    waiting: Callable[[str], None] | None = None,
) -> Cached:
    """Encode the missing entries of `wanted` and open the complete cache. Every rank calls this.

    `reopen` opens the stream if `source` is None but its images are needed after all. `repair` re-encodes shards whose
    files do not match their index; without it they raise BadInput. If another process is building, `waiting` is called
    with a message and this one waits; without `waiting`, BadInput is raised. Raises BadInput also for a cache that
    cannot be used or written, a disk that is too small, too many bad images, and an image or a caption whose encoding
    is not finite.
    """
    work = CacheBuild(settings, ranks, source, manifest, wanted, family)
    if repair:
        ranks.on_main(lambda: [drop_damaged(work.root, recipe) for recipe in work.recipes])
    work.survey()
    if ranks.any(work.only_unread() and not os.access(work.root, os.W_OK)):
        work.read_unread()  # the cache is read-only, but may still hold everything
        work.survey()
    if not ranks.any(work.missing > 0):
        work.check_bad()
        if ranks.from_main(work.tidy):
            work.find_stores()
        return work.opened()
    if source is None:
        work.source = reopen()
    folders = [work.root / recipe.folder_name for recipe in work.recipes]
    with ExitStack() as held:

        def begin() -> None:
            for folder in (*folders, manifest.folder):
                held.enter_context(locked(folder, remedies(), waiting))
            with disk_errors_as_bad_input(work.root):
                for recipe in work.recipes:
                    begin_folder(work.root, recipe)
                    finish_orphans(work.root, recipe, ranks.world_size)

        ranks.on_main(begin)
        stage_on_all_ranks(ranks, work.open_writers, work.root)
        # Survey again: a shard may have been completed, or another process may just have built everything.
        stage_on_all_ranks(ranks, lambda: work.survey(writing=True), work.root)
        ranks.on_main(work.check_space)
        stage_on_all_ranks(ranks, work.build, work.root)
        with disk_errors_as_bad_input(work.root):
            ranks.on_main(work.finish)
    encoded = ranks.gather((work.counts.images_encoded, work.counts.prompts_encoded))
    work.counts.images_encoded, work.counts.prompts_encoded = (sum(part) for part in zip(*encoded, strict=True))
    work.find_stores()
    return work.opened()


class CacheBuild:
    """One rank's view of a build."""

    def __init__(
        self,
        settings: CacheSettings,
        ranks: Ranks,
        source: RememberedSource | StreamedSource | None,
        manifest: Manifest,
        wanted: NeededRows,
        family: Family,
    ):
        self.settings, self.ranks, self.family = settings, ranks, family
        self.source, self.manifest, self.wanted = source, manifest, wanted
        self.root = settings.root
        self.recipes = recipes(settings.resolution, family)
        self.counts = Counts()
        self.ended = False  # the stream was read to its end
        self.bad: list[BadRow] = []
        self.unsaved = 0  # rows read since the manifest was last written
        # set by `find_stores`, `survey` and `open_writers`
        self.stores: list[Store] = []
        self.writers: list[Writer] = []
        self.latents, self.text = set[bytes](), set[bytes]()  # keys of the cached entries
        self.captions: dict[str, None] = {}
        self.unread = 0  # rows whose images were never hashed; for a stream an estimate, at least 1
        self.missing = self.missing_latents = self.missing_prompts = 0  # items; an unread row counts as one

    def find_stores(self) -> None:
        self.stores = [Store(self.root, recipe) for recipe in self.recipes]

    def opened(self) -> Cached:
        """Mark the stores as used and return their items for reading."""
        for store in self.stores:
            store.touch()
        return Cached(*map(CachedItems, self.stores), self.counts)

    def survey(self, writing: bool = False) -> None:
        """Find the cached entries, and count the wanted items that are `missing`; an unread row counts as one.

        With `writing`, unfinished shards count too: by now every rank has opened its own, and none has added to it yet.
        """
        self.find_stores()
        self.latents, self.text = (
            store.keys() | (log_keys(store.folder) if writing else set()) for store in self.stores
        )
        self.captions = {}
        if self.wanted.rows is not None:
            captions = self.source.captions()
            self.captions = dict.fromkeys(captions[row] for row in self.wanted.rows)
        keys: dict[bytes, None] = {}
        self.unread = pairs = 0
        for row in known_rows(self.settings.soft_labels, self.source, self.manifest, self.wanted):
            if row is None:
                self.unread += 1 if self.wanted.rows is not None else self._rest_of_stream(pairs)
            elif row.caption is not None:
                pairs += 1
                self.captions[row.caption] = None
                keys |= dict.fromkeys(key for key in row.keys if isinstance(key, bytes))
        self.counts = Counts(2 * pairs, len(keys), 0, pairs, len(self.captions), 0)
        self.missing_latents = sum(key not in self.latents for image in keys for key, _ in self._orientations(image))
        self.missing_prompts = sum(caption_key(caption) not in self.text for caption in self.captions)
        self.missing = self.missing_latents + self.missing_prompts + self.unread

    def _rest_of_stream(self, pairs: int) -> int:
        length = self.source.length if self.source is not None else None
        return 1 if length is None else max(1, min(self.wanted.pairs, length) - pairs)

    def only_unread(self) -> bool:
        """Whether nothing is known to be missing, but some rows of a table were never read."""
        return self.wanted.rows is not None and all(map(len, self.stores)) and 0 < self.unread == self.missing

    def read_unread(self) -> None:
        """Hash the images of rows that were never read, and note their keys in memory."""
        rows = [row for row in self.wanted.rows if row not in self.manifest]
        with ThreadPoolExecutor(self.settings.num_workers) as pool:
            plans = ((lambda row=row: (row, read_images(self.source, row)[0])) for row in rows)
            for row, keys in ahead(pool, plans, ROWS_AHEAD):
                self.manifest.note(row, keys)

    def check_space(self) -> None:
        """Raise BadInput if the disk cannot hold the missing entries, assuming no image of an unread row repeats.

        Captions of a stream's unread rows are not counted, because most repeat.
        """
        images, text = self.recipes
        unread = 2 * self.unread * len(self._orientations(b""))
        need = (self.missing_latents + unread) * images.record_bytes + self.missing_prompts * text.record_bytes
        free = shutil.disk_usage(self.root).free
        if free < need:
            raise BadInput(
                f"the cache folder {self.root} has {human_bytes(free)} free, but the entries that are missing need"
                f" {human_bytes(need)}{' if no image occurs twice' if unread else ''}; free some space, name another"
                " --latent_cache_dir, or train with --no-cache"
            )

    def open_writers(self) -> None:
        """Open this rank's shards where an earlier build left them."""
        if self.ranks.is_main and self.source is not None:
            self.manifest.begin(self.source)
        self.writers = [Writer(self.root, recipe, self.ranks.rank) for recipe in self.recipes]

    def build(self) -> None:
        """Encode this rank's share of the missing items."""
        self.counts = Counts()
        with ThreadPoolExecutor(self.settings.num_workers) as pool:
            try:
                with self.writers[0]:
                    self._encode_images(self.writers[0], pool)
                with self.writers[1]:
                    self._encode_prompts(self.writers[1])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def tidy(self) -> bool:
        """Save new manifest entries and complete what killed builds left; for a cache that is missing nothing.

        Returns whether any store had something to complete. A cache that cannot be written or that another process is
        building is left for a later run. Only the main rank calls this.
        """
        self.manifest.touch()
        left = [tidy(self.root, recipe) for recipe in self.recipes]
        if self.manifest.untidy:
            with suppress(OSError, BadInput), locked(self.manifest.folder, remedies()):
                if self.source is None:
                    remove_temporaries(self.manifest.folder)
                else:
                    self.manifest.begin(self.source)
                self.finish()
        elif self.manifest.changed and isinstance(self.source, RememberedSource):
            with suppress(OSError, BadInput), locked(self.manifest.folder, remedies()):
                self.manifest.begin(self.source)
                self.manifest.save(ended=False)
        return any(left)

    def finish(self) -> None:
        """Note which pairs decode, and save the manifest (main rank only). Raises BadInput for too many bad images."""
        store = Store(self.root, self.recipes[0])
        faults = {
            key: meta["bad"]
            for shard in store.shards
            for key, meta in zip(shard.keys, shard.meta, strict=True)
            if isinstance(meta, dict) and not meta["decodes"]
        }
        columns = self.manifest.columns.images
        for row in known_rows(self.settings.soft_labels, self.source, self.manifest, self.wanted):
            if row is not None and row.caption is not None:
                self.manifest.note_decoded(row.row, first_bad(row.row, row.keys, faults, columns))
        self.manifest.save(self.ended)
        self.check_bad()

    def check_bad(self) -> None:
        """Raise BadInput if too many of the wanted images are known not to decode, from this or an earlier build."""
        known = known_rows(self.settings.soft_labels, self.source, self.manifest, self.wanted)
        rows = (row.row for row in known if row is not None and row.caption is not None)
        self._refuse_too_many([bad for bad in map(self.manifest.bad, rows) if bad])

    # ---- rows ----------------------------------------------------------------------------------------------------

    def _rows(self, pool: ThreadPoolExecutor) -> Iterator[Row]:
        """Yield the wanted rows in order, with their image bytes where a latent may be missing."""
        if self.wanted.rows is None:
            yield from self._stream_rows(pool)
            return
        captions = self.source.captions()

        def row_of(row: int) -> Row:
            keys, images = read_images(self.source, row)
            return Row(row, keys, images, captions[row])

        def plan(row: int) -> "Row | Callable[[], Row]":
            if row in self.manifest and self._all_there(keys := self.manifest.images(row)):
                return Row(row, keys, None, captions[row])
            return lambda: row_of(row)

        yield from ahead(pool, map(plan, self.wanted.rows), ROWS_AHEAD)

    def _stream_rows(self, pool: ThreadPoolExecutor) -> Iterator[Row]:
        columns, pairs = self.source.columns, 0

        def plan(streamed: StreamedRow) -> Callable[[], tuple[Row, tuple]]:
            def hashed() -> tuple[Row, tuple]:
                keys = keys_of(streamed.images)
                usable = is_usable(self.settings.soft_labels, streamed._replace(images=keys), columns)
                caption = streamed.caption if usable else None
                return Row(streamed.row, keys, streamed.images, caption), (streamed.caption, streamed.label)

            return hashed

        for row, text in ahead(pool, map(plan, self.source.rows()), ROWS_AHEAD):
            if row.row not in self.manifest:
                self.manifest.note(row.row, row.keys, text)
            elif not self.manifest.agrees(row.row, row.keys, text):
                raise BadInput(
                    f"{self.source.description}: row {row.row} is not what it was when {self.manifest.folder} was made,"
                    " so the set has changed: delete that folder and start again; what is the same is not encoded again"
                )
            pairs += row.caption is not None
            yield row
            if pairs == self.wanted.pairs:
                return
        self.ended = True

    def _all_there(self, keys: Keys) -> bool:
        wanted = (key for image in keys if isinstance(image, bytes) for key, _ in self._orientations(image))
        return all(key in self.latents for key in wanted)

    # ---- images --------------------------------------------------------------------------------------------------

    def _encode_images(self, writer: Writer, pool: ThreadPoolExecutor) -> None:
        size = self.settings.vae_batch_size
        title = dict(desc="Encoding images", unit=" pairs", disable=not self.ranks.is_main)
        pairs = len(self.wanted.rows) if self.wanted.rows is not None else self.wanted.pairs
        if self.wanted.rows is None and self.source.length is not None:
            pairs = min(pairs, self.source.length)
        with tqdm(total=pairs, **title) as bar:
            units = self._units(self._rows(pool), bar)
            decoded = ahead(pool, ((lambda u=unit: self._decode(u)) for unit in units), max(16, 2 * size))
            for some in groups(decoded, size):
                self._encode_units(some, writer)
                bar.set_postfix(encoded=self.counts.images_encoded)

    def _units(self, rows: Iterator[Row], bar: tqdm) -> Iterator[_Unit]:
        """Yield this rank's share of the distinct images with missing records."""
        columns, seen = self.source.columns.images, set()
        for row in rows:
            self._note(row)
            if row.caption is None:
                continue
            bar.update()
            self.captions[row.caption] = None
            self.counts.image_uses += 2
            self.counts.captions += 1
            for side, image in enumerate(row.keys):
                if not isinstance(image, bytes) or image in seen:
                    continue
                mine = len(seen) % self.ranks.world_size == self.ranks.rank
                seen.add(image)
                missing = [(key, flip) for key, flip in self._orientations(image) if key not in self.latents]
                if mine and missing:
                    yield _Unit(row.row, columns[side], row.images[side], missing)
        self.counts.images = len(seen)

    def _note(self, row: Row) -> None:
        if row.row not in self.manifest or not self.manifest.agrees(row.row, row.keys):
            self.manifest.note(row.row, row.keys)
        self.unsaved += row.images is not None
        if self.ranks.is_main and self.unsaved >= PART_ROWS:
            self.manifest.save_part()
            self.unsaved = 0

    def _orientations(self, image: ImageKey) -> list[tuple[bytes, bool]]:
        """The record keys of an image, each with whether it is for the mirror image."""
        return [(image, False), (mirrored(image), True)] if self.settings.hflip else [(image, False)]

    def _decode(self, unit: _Unit) -> tuple[_Unit, torch.Tensor | None, Any]:
        """Decode to pixels uint8 [n,3,R,R] and [true height, true width, crop top, crop left], or None and error."""
        resolution = self.settings.resolution
        try:
            image, (height, width) = scaled(unit.data, resolution)
        except BadImage as error:
            return unit, None, {"bad": error.reason, "decodes": isinstance(error, TooThin)}
        top, left = crop_corner(image.size, resolution, None)
        squares = [to_pixels(mirror(image) if flip else image, top, left, resolution) for _, flip in unit.keys]
        return unit, torch.stack(squares), [height, width, top, left]

    def _encode_units(self, some: Sequence[tuple[_Unit, torch.Tensor | None, Any]], writer: Writer) -> None:
        pixels = [squares for _, squares, _ in some if squares is not None]
        latents = iter(())
        if pixels:
            encoded = self.family.encode_images(torch.cat(pixels), self.settings.vae_batch_size)
            finite = iter((~nonfinite_rows(encoded)).tolist())
            latents = iter(encoded.cpu().numpy())
        for unit, squares, meta in some:
            if squares is None:
                self.bad.append(BadRow(unit.row, unit.column, meta["bad"]))
                self._refuse_too_many(self.bad)
            for key, _ in unit.keys:
                if squares is None:  # a placeholder: the meta keeps its pair out of training
                    record = bytes(self.recipes[0].record_bytes)
                else:
                    record = next(latents).tobytes()
                    if not next(finite):
                        raise self.family.not_finite(unit.row)
                writer.add(key, record, meta)
                self.latents.add(key)
                self.counts.images_encoded += 1

    def _refuse_too_many(self, bad: list[BadRow]) -> None:
        rows = len(self.source) if self.wanted.rows is not None else max(len(self.manifest), 1000)
        if len(bad) > self.settings.max_bad_fraction * rows:
            raise too_many_bad(bad, rows, self.settings.max_bad_fraction, None)

    # ---- text ----------------------------------------------------------------------------------------------------

    def _encode_prompts(self, writer: Writer) -> None:
        share = list(self.captions)[self.ranks.rank :: self.ranks.world_size]
        missing = [caption for caption in share if caption_key(caption) not in self.text]
        self.counts.prompts = len(self.captions)
        with tqdm(total=len(missing), desc="Encoding prompts", unit=" prompts", disable=not self.ranks.is_main) as bar:
            for captions in groups(iter(missing), PROMPTS_A_CALL):
                encoded = self.family.encode_prompts(captions)
                fields = [encoded[field.name].cpu().numpy() for field in self.recipes[1].fields]
                finite = np.logical_and.reduce([np.isfinite(f.reshape(len(captions), -1)).all(1) for f in fields])
                if not finite.all():
                    raise self.family.text_not_finite(f"caption {captions[int(np.argmin(finite))]!r:.200}")
                for i, caption in enumerate(captions):
                    writer.add(caption_key(caption), b"".join(field[i].tobytes() for field in fields))
                bar.update(len(captions))
                self.counts.prompts_encoded += len(captions)
