"""The on-disk cache of latents and prompt embeddings, keyed by what they were computed from.

A cache folder holds the stores (`dpo_fast.store`) `latents-<hash>` and `text-<hash>`, whose entries are keyed by the
hash of the image bytes or of the caption, and for each data set a folder `pairs-<hash>` (`manifest.py`), which
remembers the images' hashes, so that a run whose entries are all cached reads no image.
"""
