"""Training: from a configuration to a published result.

`run` opens everything a trainer works with, from `batches` (the pairs and their order) and `resume` (a checkpoint);
`trainer` takes the steps; `optim`, `metrics`, `checkpoint` and `run_folder` hold its state and output; `costs` and
`memory_fit` count what a run takes, `advice` is what it warns of, `plan` is `--dry-run` and `timing` times it; `model_card`
and `hub` publish.
"""
