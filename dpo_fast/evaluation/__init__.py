"""Evaluate an alignment: generate the same prompts and seeds with base and policy, score, compare and show them."""
