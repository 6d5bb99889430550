"""On-disk stores of fixed-size records: found by key, checked when read, and resumable after a kill.

A folder of stores holds one folder per recipe (`Recipe`: what the records depend on), named after its kind and hash:

    recipe.json           what the records depend on, and the layout of a record
    shard-R-N.bin         records end to end, all the same size; R is the rank that wrote it
    shard-R-N.json        key, checksum and meta of each record, the sha256 of the .bin; no shard is complete without it
    shard-R-N.part, .log  the shard being written: its records, and for each a log line of (key, checksum, meta) that
                          ends with its own digest

A record counts once its line is in the log and its checksum matches, so a process killed at any moment loses at most
the record it was writing, and the next process resumes from there. A full shard is flushed to disk, renamed to .bin,
and gets its JSON last. Nothing in these files depends on when or how often the work was interrupted.
"""

from dpo_fast.store.reading import Found, Store
from dpo_fast.store.recipe import KEY_BYTES, Field, Recipe, Remedies, changes
from dpo_fast.store.shards import (
    Shard,
    damaged_records,
    drop_damaged,
    has_store,
    locked,
    not_writable,
    read_shard,
    remove_shard,
    shard_indices,
)
from dpo_fast.store.writing import Writer, begin_folder, finish_orphans, log_keys, mend, tidy

__all__ = [
    "KEY_BYTES",
    "Field",
    "Found",
    "Recipe",
    "Remedies",
    "Shard",
    "Store",
    "Writer",
    "begin_folder",
    "changes",
    "damaged_records",
    "drop_damaged",
    "finish_orphans",
    "has_store",
    "locked",
    "log_keys",
    "mend",
    "not_writable",
    "read_shard",
    "remove_shard",
    "shard_indices",
    "tidy",
]
