"""Choices that only the machine at hand can judge: every candidate is proven in another process, and then timed.

A plan is a module with `prove(candidate, arguments)`, which raises Disproved, and `times(candidates, arguments)`. It
runs in a child process (`trial`), since an illegal access ends a CUDA context, and a crash or a hang is an answer too.
`decision` picks the fastest proven candidate that beats the baseline by more than both vary. Plans: `pair_ops`.
"""

from dpo_fast.choices.decision import Outcome, Row, decide
from dpo_fast.choices.trial import Limits, prove, times

__all__ = ["Limits", "Outcome", "Row", "decide", "prove", "times"]
