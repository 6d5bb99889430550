"""What was encoded once: latents and prompt embeddings on disk, found again by what they were made from.

Layout of a cache folder: the stores (`dpo_fast.store`) `latents-<hash>` and `text-<hash>`, whose entries are named by
the hash of the image bytes or of the caption, and a folder for each data set (`pairs-<hash>`: `manifest.py`), which
remembers the images' hashes, so that a run whose entries are all there reads no image.
"""
