"""Choices that only the machine at hand can judge: every candidate is proven in another process, and then timed.

A plan is a module with `start(arguments)`, `prove(candidate, arguments)`, which raises Disproved, and
`times(candidates, arguments)`: `pair_ops` and `unet`. It runs in a child process (`trial`), since an illegal access
ends a CUDA context, and a crash or a hang is an answer too. `decision` picks the fastest proven candidate that beats
the baseline by more than both vary; `remembered` keeps what was found; `choose` does all of it for a run.
"""
