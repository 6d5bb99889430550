"""A machine with a GPU that is not there: trials on it have results that are set here."""

import pytest

from dpo_fast.choices import choose, machine, unet
from dpo_fast.choices.trial import Evidence
from dpo_fast.kernels import dispatch

SECONDS = {"native": 0.5, "triton": 0.6, "cudnn": 0.9, "flash": 0.95, "contiguous": 1.2, "regional": 0.85}


class Machine:
    """A GPU on which trials have these results: names in `wrong` are, the others take the product of SECONDS."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[str, ...]]] = []
        self.wrong: dict[str, str] = {}
        self.driver = "1"
        self.compile_seconds = 60.0

    def judge(self, plan, baseline, candidates, arguments, limits, note) -> Evidence:
        self.asked.append((plan.rpartition(".")[2], tuple(candidates)))
        reasons = {name: self.reason(name) for name in candidates}
        timed = [baseline, *(name for name, reason in reasons.items() if not reason)]
        rounds = {name: [self.seconds(name) * (1 + k / 1000) for k in range(5)] for name in timed}
        return Evidence(reasons, rounds, {name: self.compile_seconds if "regional" in name else 1.0 for name in timed})

    def reason(self, candidate: str) -> str:
        parts = candidate.split(", ")
        if any(part.startswith("resnets") or part == "regional-tuned" for part in parts):
            return "wrong: policy and reference differ"
        return next((f"wrong: {reason}" for name, reason in self.wrong.items() if name in parts), "")

    def seconds(self, candidate: str) -> float:
        product = 1.0
        for part in candidate.split(", "):
            product *= SECONDS.get(part, 1.0)
        return product

    @staticmethod
    def here(monkeypatch: pytest.MonkeyPatch) -> "Machine":
        """Plant one in this process."""
        planted = Machine()
        monkeypatch.setattr(choose, "judge", planted.judge)
        monkeypatch.setattr(machine, "site", lambda device: "host 0, planted GPU")
        monkeypatch.setattr(machine, "facts", lambda device: {"device": "planted GPU", "driver": planted.driver})
        monkeypatch.setattr(unet, "share_of_run", lambda arguments: 0.25)
        monkeypatch.delenv(dispatch.VARIABLE, raising=False)
        return planted
