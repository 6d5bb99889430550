"""Training: from a configuration to a published result.

`run` opens everything a trainer works with, from `batches` (the pairs and their order) and `resume` (a checkpoint);
`trainer` takes the steps; `optim`, `metrics`, `checkpoint` and `run_folder` hold its state and output; `model_card` and
`hub` publish. Before a run, `costs` and `memory_fit` count what it takes and `advice` warns; `plan` is `--dry-run`, and
`timing` its few steps.
"""
