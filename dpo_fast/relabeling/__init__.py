"""Relabelling: pairs scored by one or several scorers, and labels from the scores."""
