"""Whether the alignment worked: the same prompts and seeds through base and policy, scored, compared, shown."""
