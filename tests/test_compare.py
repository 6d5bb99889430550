"""Runs side by side: what is read, what differs, what may be pooled and compared, and what becomes of hostile text."""

import csv
import html
import io
import json
import math
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import dpo_fast
from dpo_fast.checksums import Damaged, write_signed_json
from dpo_fast.compare import main as compare
from dpo_fast.comparing import formats, options
from dpo_fast.comparing.folders import distinct_names, places_of
from dpo_fast.comparing.lines import Line, chart
from dpo_fast.comparing.logs import Point, averaged, last_step, read_log, thinned
from dpo_fast.comparing.overview import Overview, overview
from dpo_fast.comparing.page import page
from dpo_fast.comparing.pairing import contrast, evidence_of, why_not
from dpo_fast.comparing.reading import Entry, read_entry
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.scored import Scored, read_scores, write_scores
from dpo_fast.statistics import Bootstrap, Interval
from tests.evaluation.report.test_page import Tree
from tests.helpers import made_runs as made

ODD = "a<b>&\"'|`*_{}[]()#+-.!~^%$\\@x https://evil.example www.evil.example é \u202e 🦊 \x07"
SCORERS = ("beauty", "truth")


def entries(*folders: Path) -> list[Entry]:
    return [read_entry(place) for place in places_of(folders)]


def seen(*folders: Path, **options: object) -> Overview:
    return overview(entries(*folders), **options)


def cells(of: Overview, key: str, scorer: str | None = None) -> dict[str, object]:
    """Row's name -> its cell in a column."""
    tables = [of.scorers[scorer]] if scorer else [of.training, *([of.signals] if of.signals else [])]
    (column,) = (column for table in tables for column in table.columns if column.key == key)
    return {row.name: cell for row, cell in zip(of.rows, column.cells, strict=True)}


def heads(of: Overview) -> list[str]:
    return [column.key for column in of.training.columns]


# ---- what a run says ---------------------------------------------------------------------------------------------


def test_a_finished_run_is_read_as_it_was_reported(tmp_path):
    of = made.scores(0.4, scorers=SCORERS)
    run = made.run(tmp_path / "a", of, steps=40, beta_dpo=2000.0)
    (entry,) = entries(run)
    said = json.loads((run / "summary.json").read_text())
    assert (entry.steps, entry.pairs, entry.loss, entry.seconds) == (40, 160, said["loss_last"], 12.0)
    assert entry.settings["beta_dpo"] == 2000.0 and entry.finished and entry.missing == []
    assert list(entry.held_out) == [0.6, *said["validation_accuracy_ci95"]]
    assert list(entry.evaluation.judged) == [*SCORERS]
    win_rate = said["scores"]["truth"]["win_rate"]
    assert list(entry.evaluation.judged["truth"].win_rate) == [win_rate[end] for end in ("rate", "low", "high")]
    assert entry.evaluation.signals["sharpness"].difference.value == 10
    assert entry.evaluation.scored.prompts == of.prompts
    assert [point.step for point in entry.curves["loss"]] == [*range(2, 41, 2)]


def test_an_unfinished_run_says_how_far_it_is(tmp_path):
    run = made.run(tmp_path / "a", done=7, lines=7, held_out=0.55)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 0.1')  # which is being written
    (entry,) = entries(run)
    assert entry.missing == ["unfinished: at step 7 of 20"] and not entry.finished
    assert (entry.steps, entry.pairs, entry.held_out, entry.seconds) == (7, 28, 0.55, None)
    (run / "metrics.jsonl").unlink()
    assert entries(run)[0].missing == ["unfinished: before its first step"]


def test_an_evaluation_has_the_settings_of_its_run(tmp_path):
    of = made.scores(0.3)
    one = made.evaluation(tmp_path / "a", of, trained={"seed": 3, "max_train_steps": 50})
    other = made.evaluation(tmp_path / "b", of)
    first, second = entries(one, other)
    assert (first.kind, first.settings["seed"], first.steps, first.pairs) == ("evaluation", 3, 50, 200)
    assert second.settings is None and second.evaluation.judged["beauty"].gain.value == pytest.approx(
        of.gain("beauty").mean().item()
    )
    implicit = {
        "implicit_accuracy": 0.7,
        "implicit_accuracy_ci95": [0.6, 0.8],
        "draws": 8,
        "files": {"pairs": {"p": "1"}},
    }
    write_signed_json(two := tmp_path / "b" / "summary.json", {"implicit": implicit})
    (entry,) = entries(two.parent)
    assert entry.held_out == Interval(0.7, 0.6, 0.8) and entry.held_out_of == "8 draws of p @ 1"
    assert entry.evaluation is None


def test_a_sweep_is_its_runs_with_those_that_failed(tmp_path):
    sweep = tmp_path / "sweep"
    for beta in (500.0, 2000.0):
        made.run(sweep / f"beta_dpo={beta:g}", beta_dpo=beta)
    made.run(sweep / "beta_dpo=7", done=3, beta_dpo=7.0)  # of an earlier command
    rows = [{"beta_dpo": "2000", "status": 0}, {"beta_dpo": "500", "status": 0}, {"beta_dpo": "-1", "status": 2}]
    write_signed_json(sweep / "sweep.json", {"flags": [], "swept": {"beta_dpo": ["2000", "500", "-1"]}, "runs": rows})
    found = seen(sweep)
    assert [row.name for row in found.rows] == ["beta_dpo=2000", "beta_dpo=500", "beta_dpo=-1", "beta_dpo=7"]
    assert cells(found, "beta_dpo") == {
        "beta_dpo=2000": "2000",
        "beta_dpo=500": "500",
        "beta_dpo=-1": None,
        "beta_dpo=7": "7",
    }
    assert "beta_dpo=-1: it ended with 2" in found.missing


def test_a_sweep_names_no_folder_outside_its_own(tmp_path):
    made.run(tmp_path / "outside")
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    rows = [{"../outside": "x", "status": 0}, {"a": "/etc", "status": 0}, {"a": 1, "status": 0}, 7]
    write_signed_json(sweep / "sweep.json", {"flags": [], "swept": {"a": []}, "runs": rows})
    (place,) = places_of([sweep])
    assert place.kind == "unknown" and "none of its own" in place.missing[0]
    write_signed_json(sweep / "sweep.json", {"flags": [], "swept": {"../outside": []}, "runs": rows[:1]})
    assert [place.kind for place in places_of([sweep])] == ["unknown"]


def test_a_run_that_was_not_evaluated_says_so_beside_others(tmp_path):
    plain, other = made.run(tmp_path / "plain"), made.run(tmp_path / "other", made.scores(0.2))
    assert seen(plain, other).missing == ["plain: no evaluation"]
    assert seen(plain).missing == []


def test_names_are_as_short_as_they_can_be(tmp_path):
    assert distinct_names([Path("/x/a/run"), Path("/x/b/run"), Path("/x/c")]) == ["a/run", "b/run", "c"]
    run = made.run(tmp_path / "run")
    link = tmp_path / "again"
    link.symlink_to(run)
    assert len(places_of([run, tmp_path / "." / "run", link])) == 1


def test_a_pick_and_a_run_that_ended_early_say_which_weights_are_theirs(tmp_path):
    run = made.run(tmp_path / "a", made.scores(0.2), summary={"ended_early": {"at": 20, "result_of": 12}, "looks": []})
    pick = run / "pick"  # has no logs, and its summary neither loss nor accuracies
    pick.mkdir()
    shutil.copyfile(run / "config.yaml", pick / "config.yaml")
    scores = made.scores(0.4, training=1)
    write_signed_json(pick / "summary.json", made.numbers(scores).numbers() | {"steps": 8, "strength": 0.5})
    write_scores(pick / "scores.parquet", scores)
    other = made.run(tmp_path / "b", made.scores(0.3), seed=2)
    found = seen(run, pick, other)
    assert found.missing == [] and found.incomparable == []
    assert cells(found, "result_of") == {"a": 12, "pick": None, "b": None}
    assert cells(found, "strength") == {"a": None, "pick": 0.5, "b": None}
    assert cells(found, "steps") == {"a": 20, "pick": 8, "b": 20} and cells(found, "pairs")["pick"] == 32
    assert cells(found, "gain", "beauty")["pick"].value == pytest.approx(0.4, abs=0.15)
    # a strength is no seed
    assert [row.name for row in seen(pick, other, pool_seeds=True).rows] == ["pick", "b"]


# ---- what differs ------------------------------------------------------------------------------------------------


def test_only_settings_that_differ_are_columns(tmp_path):
    one = made.run(tmp_path / "a", seed=1, tuning="lora", rank=8)
    two = made.run(tmp_path / "b", seed=2, tuning="lora", rank=4, steps=30, output_dir=tmp_path / "elsewhere")
    found = seen(one, two)
    assert heads(found)[:3] == ["run", "rank", "seed"] and "max_train_steps" not in heads(found)
    assert cells(found, "rank") == {"a": "8", "b": "4"} and cells(found, "steps") == {"a": 20, "b": 30}
    assert found.common["objective"] == "dpo" and found.common["beta_dpo"] == "5000" and "rank" not in found.common
    assert not {"output_dir", "train_batch_size"} & {*found.common, *heads(found)}
    full = made.run(tmp_path / "c", tuning="full", rank=4)
    assert cells(seen(one, full), "rank") == {"a": "8", "c": None}
    assert "lora_targets" not in heads(seen(one, full))


def test_one_run_alone_is_shown_with_its_settings(tmp_path):
    found = seen(made.run(tmp_path / "a", made.scores(0.2), learning_rate=3e-5))
    assert found.common["learning_rate"] == "3e-05" and heads(found)[1] == "steps"
    text = formats.terminal(found)
    assert text.startswith("1 run: objective dpo, ") and "win rate" in text and "difference" not in text


# ---- pairs of runs -----------------------------------------------------------------------------------------------


def test_differences_are_those_of_the_paired_scores(tmp_path):
    strong, weak = made.scores(0.6, training=1), made.scores(0.2, training=2)
    found = seen(made.run(tmp_path / "weak", weak), made.run(tmp_path / "strong", strong, beta_dpo=500.0))
    assert found.reference.name == "weak" and cells(found, "gain_difference", "beauty")["weak"] is None
    wins = [(of.policy["beauty"] > of.base["beauty"]).double() for of in (strong, weak)]
    expected = Bootstrap(weak.prompts).mean(wins[0] - wins[1])
    assert cells(found, "win_rate_difference", "beauty")["strong"] == pytest.approx(expected)
    gain = cells(found, "gain_difference", "beauty")["strong"]
    assert gain.value == pytest.approx((strong.policy["beauty"] - weak.policy["beauty"]).mean().item())
    direct = (strong.policy["beauty"] > weak.policy["beauty"]).double()
    assert cells(found, "wins_over_reference", "beauty")["strong"].value == direct.mean().item()
    # pairs tell more than two intervals do: the policies share what noise and prompt do to a score
    alone = [cells(found, "gain", "beauty")[name] for name in ("weak", "strong")]
    assert gain.high - gain.low < sum(of.high - of.low for of in alone)


def test_a_run_against_its_copy_differs_by_nothing(tmp_path):
    of = made.scores(0.3)
    found = seen(made.run(tmp_path / "a", of), made.run(tmp_path / "b", of, seed=2))
    assert cells(found, "win_rate_difference", "beauty")["b"] == (0, 0, 0)
    assert cells(found, "gain_difference", "beauty")["b"] == (0, 0, 0)
    assert cells(found, "wins_over_reference", "beauty")["b"] == (0.5, 0.5, 0.5)


def test_rows_in_another_order_are_the_same_rows(tmp_path):
    of = made.scores(0.3)
    order = torch.randperm(len(of.prompts))
    sides = ({name: values[order] for name, values in side.items()} for side in (of.base, of.policy))
    shuffled = Scored([of.prompts[row] for row in order], [of.seeds[row] for row in order], *sides)
    one, two = entries(made.run(tmp_path / "a", of), made.run(tmp_path / "b", shuffled))
    assert why_not(two.evaluation, one.evaluation, "beauty") is None
    changes = contrast(evidence_of(two.evaluation, "beauty"), evidence_of(one.evaluation, "beauty"))
    assert changes.gain == (0, 0, 0)


PROMPTS = tuple(f"prompt {number}" for number in range(30))
OTHERS = {
    "prompts": (made.scores(0.2, prompts=(*PROMPTS[:29], "another")), {}, "other prompts: 29 of its 30 are among"),
    "fewer seeds": (made.scores(0.2, images=1), {}, "other seeds: 30 of its 30 images"),
    "no such scorer": (made.scores(0.2, scorers=("truth",)), {}, None),
    "sampler": (made.scores(0.2), {"settings": {**made.SAMPLED, "Steps": "20"}}, "steps 20 instead of 50"),
    "noise": (made.scores(0.2, noise=1), {}, "other noise"),
    "baseline": (made.scores(0.2, noise=1), {"base": "files 99"}, "another baseline"),
    "dtype": (
        made.scores(0.2, noise=1),
        {"settings": {**made.SAMPLED, "Dtype": "bfloat16"}},
        "other precision (bfloat16 instead of none)",
    ),
    "scorer": (
        made.scores(0.2),
        {"scorers": {"beauty": {**made.PROVENANCE, "dtype": "float16"}}},
        "another beauty: its dtype differ",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_compared_is_marked_with_the_reason(tmp_path, name):
    of, about, reason = OTHERS[name]
    known = {"scorers": {scorer: made.PROVENANCE for scorer in of.scorers}} | about
    one = made.run(tmp_path / "a", made.scores(0.4))
    two = made.run(tmp_path / "b", of, settings_of=made.about(**known), seed=2)
    found = seen(one, two)
    if reason is None:  # no row in that scorer's table
        assert found.scorers["beauty"].rows == [0] and found.scorers["truth"].rows == [1]
        assert not any("difference" in column.key for column in found.scorers["truth"].columns)
        return
    (line,) = found.incomparable
    assert line.startswith("b: not compared with a: ") and reason in line
    assert found.scorers["beauty"].marks == {1: 1}
    assert not any("difference" in column.key for column in found.scorers["beauty"].columns)
    assert re.search(r"^b \(1\) .*0\.\d{3} \[", formats.terminal(found), re.M)
    assert "(1) b: not compared with a" in " ".join(formats.terminal(found).split())


def test_medians_are_not_compared_with_images(tmp_path):
    of = made.scores(0.4, images=3)
    one, two = made.run(tmp_path / "a", of), made.run(tmp_path / "b", of, medians=True)
    three = made.run(tmp_path / "c", of, medians=True, seed=2)
    assert "medians" in seen(one, two).incomparable[0]
    found = seen(two, three)
    assert found.incomparable == [] and cells(found, "win_rate_difference", "beauty")["c"] == (0, 0, 0)
    assert len(evidence_of(entries(two)[0].evaluation, "beauty").keys) == 30


def test_rounding_of_another_machine_is_no_other_noise(tmp_path):
    of = made.scores(0.4)
    sides = (
        {name: values + 1e-4 * torch.randn(len(values)) for name, values in side.items()}
        for side in (of.base, of.policy)
    )
    near = Scored(of.prompts, of.seeds, *sides)
    found = seen(made.run(tmp_path / "a", of), made.run(tmp_path / "b", near, seed=2))
    assert found.incomparable == []


def test_another_reference_can_be_named(tmp_path):
    runs = [made.run(tmp_path / name, made.scores(0.1, training=k), seed=k) for k, name in enumerate("abc")]
    assert seen(*runs, against="b").reference.name == seen(*runs, against=f"{runs[1]}/").reference.name == "b"
    with pytest.raises(BadInput, match="--against x is none of the runs: name one of a, b, c"):
        seen(*runs, against="x")
    plain = made.run(tmp_path / "plain")
    with pytest.raises(BadInput, match="has no scores of single images"):
        seen(*runs, plain, against="plain")
    assert seen(plain, *runs).reference.name == "a"


# ---- seeds -------------------------------------------------------------------------------------------------------


def test_seeds_are_pooled_over_the_prompts_that_they_share(tmp_path):
    several = [made.scores(0.3, training=seed) for seed in (1, 2, 3)]
    runs = [made.run(tmp_path / f"base-seed{seed}", of, seed=seed) for seed, of in enumerate(several, start=1)]
    other = made.run(tmp_path / "other", made.scores(0.9, training=9), beta_dpo=500.0)
    found = seen(*runs, other, pool_seeds=True)
    assert [row.name for row in found.rows] == ["base (3 seeds)", "other"]
    assert cells(found, "seed") == {"base (3 seeds)": "1, 2, 3", "other": "1"}
    looks = torch.stack([(of.policy["beauty"] > of.base["beauty"]).double() for of in several], 1)
    pooled = Bootstrap(several[0].prompts).share(looks)
    assert cells(found, "win_rate", "beauty")["base (3 seeds)"] == pytest.approx(pooled)
    each = ", ".join(f"{rate:.3f}" for rate in looks.mean(0).tolist())
    assert cells(found, "win_rate_of_each_seed", "beauty")["base (3 seeds)"] == each
    change = cells(found, "gain_difference", "beauty")["other"]
    mean = sum(of.policy["beauty"].mean().item() for of in several) / 3
    assert change.value == pytest.approx(made.scores(0.9, training=9).policy["beauty"].mean().item() - mean)


def test_what_differs_in_more_than_the_seed_is_not_pooled(tmp_path):
    of = made.scores(0.3)
    runs = [
        made.run(tmp_path / "a1", of, seed=1, summary={"seconds": 10.0}),
        made.run(tmp_path / "a2", of, seed=2, train_batch_size=1, summary={"seconds": 30.0}),  # rounding only
        made.run(tmp_path / "same", of, seed=2),
        made.run(tmp_path / "noise", made.scores(0.3, noise=1), seed=3),
        made.run(tmp_path / "steps", of, seed=4, steps=21),
        made.run(tmp_path / "plain", seed=5),
        made.run(tmp_path / "going", seed=6, done=3),
    ]
    found = seen(*runs, pool_seeds=True)
    assert [row.name for row in found.rows] == ["a1 (2 seeds)", "same", "noise", "steps", "plain", "going"]
    assert cells(found, "seconds")["a1 (2 seeds)"] == (20.0, 10.0, 30.0)
    said = "\n".join(found.missing)
    assert "same: not pooled with a1: a2 has its seed, too" in said
    assert "noise: not pooled with a1: the scores of its baseline differ" in said
    assert [row.name for row in seen(*runs[:2]).rows] == ["a1", "a2"]


@pytest.mark.parametrize(
    "names, shown",
    [
        (["run-10", "run-12"], "run (2 seeds)"),
        (["seed=1-beta_dpo=500", "seed=2-beta_dpo=500"], "beta_dpo=500 (2 seeds)"),
        (["x_seed_1", "x_seed_2"], "x (2 seeds)"),
        (["a-1-b", "a-2-b"], "a-b (2 seeds)"),
        (["one", "two"], "one (2 seeds)"),
    ],
)
def test_pooled_runs_have_the_name_that_they_share(tmp_path, names, shown):
    runs = [made.run(tmp_path / name, seed=seed) for seed, name in enumerate(names)]
    assert [row.name for row in seen(*runs, pool_seeds=True).rows] == [shown]


# ---- damaged and hostile files -----------------------------------------------------------------------------------

DAMAGES = {
    "summary.json": [b"", b"[" * 100_000, b"{}", b"[1]", b'{"steps": "x"}', b'{"a": NaN}', b"\xff\xfe"],
    "config.yaml": [
        b"",
        b"- a\n",
        b"\xff",
        b"seed: !!python/object/apply:os.system [ls]\n",
        b"[" * 20_000,
        b"seed: {a: 1}\n",
    ],
    "metrics.jsonl": [
        b"",
        b"[]\n" * 5,
        b"\xff\n",
        b'{"step": 1e400}\n',
        b'{"step": -1}\n{"step": true}\n',
        b"[" * 99_999 + b"\n",
    ],
    "validation.jsonl": [b'{"step": 1, "validation_accuracy": "x"}\n', b'{"step": 1, "validation_accuracy": 1e999}\n'],
    "scores.parquet": [b"", b"PAR1", b"x" * 500],
    "evaluation.json": [b""],
    "sweep.json": [b"", b"{}", b'{"swept": [], "runs": {}}', b"[" * 100_000],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_said_and_never_a_traceback(tmp_path, name, capsys):
    for number, data in enumerate(DAMAGES[name]):
        good = made.run(tmp_path / f"good-{number}", made.scores(0.2))
        bad = made.run(tmp_path / f"bad-{number}", made.scores(0.2), seed=2)
        (bad / name).write_bytes(data)
        outputs = [f"--{kind}={tmp_path / f'{number}{kind}'}{options.SUFFIXES[kind][0]}" for kind in options.BEGINS]
        assert compare([str(good), str(bad), *outputs]) == 0, data[:40]
        out = capsys.readouterr()
        assert f"bad-{number}" in out.out and "Traceback" not in out.err


def test_every_number_may_be_anything(tmp_path):
    """A summary that was forged and signed: what is not of its kind counts as missing."""
    run = made.run(tmp_path / "a", made.scores(0.2))
    whole = json.loads((run / "summary.json").read_text())
    del whole["digest"]
    read = "steps pairs_seen seconds loss_last implicit_accuracy validation_accuracy validation_accuracy_ci95 scores"
    read += " overoptimised_at win_rate prompts images medians_compared settings models scorers signals warnings"
    paths = [[name] for name in read.split()] + [["scores", "beauty"], ["scores", "beauty", "win_rate"]]
    assert {name for name, *_ in paths} <= whole.keys()
    for path in paths:
        for value in (True, "x", [7, None], {"x": 1}, -1, 10**400):
            changed = json.loads(json.dumps(whole))
            inner = changed
            for name in path[:-1]:
                inner = inner[name]
            inner[path[-1]] = value
            write_signed_json(run / "summary.json", changed)
            found = seen(run)
            assert formats.terminal(found) and formats.as_csv(found) and page(found, "today")


def test_numbers_that_nothing_measures_are_not_computed_with(tmp_path):
    of = made.scores(0.2)
    huge = Scored(of.prompts, of.seeds, {"beauty": of.base["beauty"] * 1e200}, {"beauty": of.policy["beauty"] * 1e300})
    run = made.run(tmp_path / "a", of)
    write_scores(run / "scores.parquet", huge)
    assert "which no scorer gives" in entries(run)[0].missing[0]
    summary = json.loads((run / "summary.json").read_text())
    del summary["digest"]
    summary["scores"]["beauty"]["win_rate"]["rate"] = 7.0  # no share
    summary |= {"loss_last": 1e300, "validation_accuracy": -3.0}
    write_signed_json(run / "summary.json", summary)
    (entry,) = entries(run)
    assert (entry.loss, entry.evaluation, entry.held_out) == (None, None, -3.0)
    assert "summary.json says nothing of any scorer" in entry.missing


def test_links_without_an_end_and_fifos_are_not_waited_for(tmp_path):
    for name in ("summary.json", "config.yaml", "metrics.jsonl", "scores.parquet"):
        run = made.run(tmp_path / name, made.scores(0.2))
        (run / name).unlink()
        os.mkfifo(run / name)
        assert entries(run)[0].name == name if name != "config.yaml" else places_of([run])[0].kind == "unknown"
        (run / name).unlink()
        (run / name).symlink_to("/dev/zero")
        places_of([run])


def test_scores_of_another_evaluation_are_not_used(tmp_path):
    run = made.run(tmp_path / "a", made.scores(0.2))
    write_scores(run / "scores.parquet", made.scores(0.2, training=5))
    (entry,) = entries(run)
    assert entry.evaluation.scored is None and "is not of the evaluation in summary.json" in entry.missing[0]
    (run / "scores.parquet").unlink()
    assert entries(run)[0].missing == ["no scores.parquet: its images are not compared with those of others"]


def test_a_table_that_is_no_scores_is_refused(tmp_path):
    of, path = made.scores(0.2), tmp_path / "s.parquet"
    write_scores(path, of)
    table = pq.read_table(path)
    column = table.column_names.index
    for changed, said in {
        "columns": (table.drop_columns(["pair"]), "its columns are not"),
        "no scorer": (table.drop_columns(["beauty"]), "its columns are not"),
        "kind": (table.set_column(column("seed"), "seed", pa.array([0.5] * table.num_rows)), "'seed' holds double"),
        "nulls": (
            table.set_column(column("prompt"), "prompt", pa.array([None] * table.num_rows, pa.string())),
            "nulls",
        ),
        "odd": (table.slice(0, table.num_rows - 1), "not pairs"),
        "empty": (table.slice(0, 0), "not pairs"),
        "sides": (table.set_column(column("model"), "model", pa.array(["base"] * table.num_rows)), "base and a policy"),
        "not finite": (
            table.set_column(column("beauty"), "beauty", pa.array([math.inf] * table.num_rows)),
            "gave inf",
        ),
    }.values():
        pq.write_table(changed, path)
        with pytest.raises(Damaged, match=said):
            read_scores(path)


def test_a_short_file_that_stands_for_gigabytes_is_not_expanded(tmp_path, monkeypatch):
    of = made.scores(0.2)
    long = "x" * (1 << 20)
    write_scores(tmp_path / "s.parquet", Scored([long] * 60, of.seeds, of.base, of.policy))
    found = read_scores(tmp_path / "s.parquet")
    assert len({id(prompt) for prompt in found.prompts}) == 1 and found.prompts[0] == long
    monkeypatch.setattr("dpo_fast.evaluation.scored.MOST_ROWS", 100)
    with pytest.raises(Damaged, match="more than can be held"):
        read_scores(tmp_path / "s.parquet")
    monkeypatch.setattr("dpo_fast.comparing.untrusted.LARGEST", 100)
    run = made.run(tmp_path / "a", made.scores(0.2))
    assert "more than any such file" in " ".join(entries(run)[0].missing)


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "nothing is named"),
        (["nowhere"], "nowhere does not exist"),
        (["a", "--page", "x.csv"], "must end in .html"),
        (["a", "--csv", "x.csv", "--latex", "x.tex", "--markdown", "y.md", "--page", "sub"], "must end in .html"),
        (["a", "--csv", "theirs.csv"], "exists and was not written by this command"),
        (["a", "--page", "a/report.html"], "exists and was not written by this command"),
        (["a", "--csv", "folder.csv"], "is a folder"),
        (["a", "--csv", "theirs.csv/x.csv"], "cannot be written"),
        (["a", "--pool", "beta"], "pool"),
        (["a", "--agianst", "b"], "against"),
        (["foreign"], "it has none of config.yaml, sweep.json and evaluation.json"),
        (["runs"], "there are runs in it, such as runs/one"),
        (["theirs.csv"], "it is no folder"),
        (["a", "--against", "x"], "none of the runs: name one of a"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, monkeypatch, capfd, argv, said):
    monkeypatch.chdir(tmp_path)
    made.run(Path("a"))
    made.run(Path("runs", "one"))
    Path("a", "report.html").write_text("<!doctype html>")
    Path("theirs.csv").write_text("a,b\n")
    Path("foreign").mkdir()
    Path("folder.csv").mkdir()
    assert compare(argv) == 2
    err = capfd.readouterr().err
    assert said in err and len([line for line in err.splitlines() if "error:" in line]) == 1
    assert Path("theirs.csv").read_text() == "a,b\n" and not Path("x.csv").exists()


def test_a_foreign_folder_among_runs_is_a_row(tmp_path, capfd):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    made.run(tmp_path / "a", made.scores(0.2))
    assert compare([str(tmp_path / name) for name in ("a", "foreign", "notes.txt")]) == 0
    out = capfd.readouterr().out
    assert "foreign: no run, sweep or evaluation" in out and "notes.txt: it is no folder" in out


def test_the_outputs_are_written_and_written_again(tmp_path, capfd):
    runs = [str(made.run(tmp_path / name, made.scores(0.2), seed=k)) for k, name in enumerate("ab")]
    files = {kind: tmp_path / "new" / f"out{suffixes[0]}" for kind, suffixes in options.SUFFIXES.items()}
    argv = [*runs, *(f"--{kind}={path}" for kind, path in files.items())]
    assert compare(argv) == 0
    first = {kind: path.read_bytes() for kind, path in files.items()}
    assert compare(argv) == 0  # its own files are replaced
    assert first == {kind: path.read_bytes() for kind, path in files.items()}
    assert all(data.startswith(options.BEGINS[kind]) for kind, data in first.items())
    assert not list(tmp_path.rglob(".tmp-*"))


def test_from_python_it_is_the_command(tmp_path, capfd):
    runs = [made.run(tmp_path / name, made.scores(0.2, training=k), seed=k) for k, name in enumerate("ab")]
    files = {"csv": tmp_path / "out.csv", "page": tmp_path / "out.html"}
    found = dpo_fast.compare(runs=runs, pool="seed", **files)
    written = {name: path.read_bytes() for name, path in files.items()}
    assert found.files == files and [len(row.members) for row in found.overview.rows] == [2]
    capfd.readouterr()
    assert compare([*map(str, runs), "--pool", "seed", *(f"--{name}={path}" for name, path in files.items())]) == 0
    assert capfd.readouterr().out == f"{found}\n"
    assert written == {name: path.read_bytes() for name, path in files.items()}
    again = dpo_fast.compare(dpo_fast.CompareConfig(runs=tuple(runs), against="b"))
    assert again.overview.reference.name == "b" and again.files == {}
    with pytest.raises(BadInput, match="nothing is named"):
        dpo_fast.compare()


# ---- formats -----------------------------------------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path) -> Overview:
    """Runs whose names, settings, scorers, warnings and settings hold what every format must escape."""
    of = made.scores(0.4, scorers=(ODD,))
    runs = [
        made.run(
            tmp_path / ODD.replace("/", "").replace("\x07", ""), of, label_column=ODD, summary={"warnings": [ODD]}
        ),
        made.run(tmp_path / "=cmd|'/C calc'!A0".replace("/", ""), of, seed=2, label_column="plain"),
        made.run(tmp_path / "unfinished", done=3, objective="my_module:loss"),
    ]
    return seen(*runs)


def test_the_terminal_fits_80_columns(tmp_path):
    runs = [
        made.run(tmp_path / f"run-{seed}", made.scores(0.1 * seed, scorers=SCORERS, training=seed), seed=seed)
        for seed in range(4)
    ]
    for width in (80, 120):
        lines = formats.terminal(seen(*runs), width).splitlines()
        assert max(map(len, lines)) <= width
    wide, narrow = (formats.terminal(seen(*runs), width) for width in (200, 80))
    assert len(wide.splitlines()) < len(narrow.splitlines())
    long = [made.run(tmp_path / f"{'a-long-name-' * 4}{seed}", made.scores(0.1), seed=seed) for seed in range(2)]
    text = formats.terminal(seen(*long))
    assert max(map(len, text.splitlines())) <= 80 and f"\n1  {'a-long-name-' * 4}0\n" in text
    assert re.search(r"^2 +0\.\d{3} \[", text, re.M)


def test_nothing_that_a_terminal_obeys_is_printed(odd):
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", formats.terminal(odd))


def test_csv_has_all_numbers_and_no_formulas(odd, tmp_path):
    lines = list(csv.reader(io.StringIO(formats.as_csv(odd))))
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1 and len(set(lines[0])) == len(lines[0])
    assert lines[2][0].startswith("'=cmd") and not any(cell[:1] in "=+@" for line in lines for cell in line if cell)
    (run,) = entries(made.run(tmp_path / "plain", made.scores(0.4)))
    head, line = csv.reader(io.StringIO(formats.as_csv(overview([run]))))
    value = dict(zip(head, line, strict=True))
    win_rate = run.evaluation.judged["beauty"].win_rate
    assert [float(value[f"beauty: win_rate{end}"]) for end in ("", "_low", "_high")] == list(win_rate)
    assert float(value["loss"]) == run.loss and value["steps"] == "20"


def test_markdown_holds_no_markup_of_others(odd):
    text = formats.markdown(odd)
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("| ")]
    assert len(tables) == len(odd.tables) >= 3
    for lines, table in zip(tables, odd.tables, strict=True):
        rows = [re.findall(r"((?:\\.|[^|\\])+)\|", line[1:]) for line in lines]
        assert {len(row) for row in rows} == {len(table.columns)} and len(rows) == 2 + len(table.rows)
        # read as GitHub reads it, a cell is what was to be shown
        for row, number in zip(rows[2:], table.rows, strict=True):
            read = html.unescape(re.sub(r"\\(.)", r"\1", row[0])).replace("\u200b", "").strip()
            assert read == formats.printable(formats.name_of(table, number)).strip()
    assert not re.search(r"<(?!!-- made)", text) and "https://" not in text and "www.evil" not in text
    assert not re.search(r"(?<!\\)[`\[*]|@x", text.replace("\\\\", "").replace("**", ""))


def test_latex_is_escaped(odd):
    text = formats.latex(odd)
    assert text.isascii() or set(re.findall(r"[^\x00-\x7f]", text)) <= {"é"}
    body = re.sub(r"\\(?:begin|end)\{\w+\}|\{@\{\}l[r]*@\{\}\}", "", text)
    depth = 0
    for found in re.finditer(r"\\[{}\\]|[{}]", body):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        assert depth >= 0
    assert depth == 0
    for line in text.splitlines():
        if line.endswith(r"\\"):
            cells_of = re.findall(r"(?<!\\)&", line)
            assert not re.search(r"(?<!\\)[%$#_](?!-\$)", line.replace("$-$", "")), line
            assert len(cells_of) >= 1
    assert "{[}U+1F98A{]}" in text and "\\textbackslash{}" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(odd, tmp_path):
    (tmp_path / "table.tex").write_text(formats.latex(odd), encoding="utf-8")
    document = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{table}\end{document}"
    (tmp_path / "main.tex").write_text(document)
    ran = subprocess.run(
        ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "main.tex"],
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout.decode(errors="replace")[-2000:]


# ---- the page ----------------------------------------------------------------------------------------------------


def test_the_page_is_whole_loads_nothing_and_runs_nothing(odd):
    text = page(odd, "today")
    text.encode()
    tree = Tree(text.replace("<path ", "<line "))  # which ends itself, too
    assert not re.search(r"@import|url\(|javascript:", text) and not tree.of("script") and not tree.of("img")
    assert all(set(a) & {"href", "src", "srcset", "action", "onclick", "onerror"} == set() for _, a in tree.elements)
    (policy,) = (a["content"] for a in tree.of("meta") if a.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "<b>" not in text.replace(re.search(r"<style>.*</style>", text, re.S)[0], "").replace("<b>0.", "")
    said = html.unescape(text)
    assert ODD.replace("\x07", "\ufffd") in said and "unfinished: at step 3 of 20" in said


def test_the_charts_say_in_words_what_they_draw(tmp_path):
    runs = [made.run(tmp_path / name, made.scores(0.3), seed=k) for k, name in enumerate("ab")]
    tree = Tree(page(seen(*runs), "today").replace("<path ", "<line "))
    labels = [a["aria-label"] for a in tree.of("svg") if "aria-label" in a]
    assert sum("over the steps to 20" in label for label in labels) == 4
    assert any(label.startswith("Loss over the steps to 20. At the end: a: 0.68") for label in labels)
    assert sum(label.startswith("a: win rate 0.") for label in labels) == 1
    assert {"Training", "Win rates", "Over the steps", "Held-out accuracy"} <= set(tree.texts["h2"])


def test_a_page_of_runs_without_anything_is_a_page(tmp_path):
    found = seen(made.run(tmp_path / "a", done=0, lines=0, held_out=None), made.run(tmp_path / "b", held_out=None))
    text = page(found, "today")
    assert "Win rates" not in text and "before its first step" in text


def test_a_chart_has_its_points_where_they_belong():
    lines = [Line(0, "a", [Point(0, 0.0), Point(50, 1.0), Point(100, 0.5)])]
    found = chart("Loss", lines)
    (path, dots) = re.findall(r'class="c0 d0(?: dots)?" d="([^"]*)"', found)
    assert path == "M0.0 1000.0L500.0 0.0L1000.0 500.0" and dots.count("h0") == 3
    assert re.findall(r'left:([\d.]+)%">([\d,]+)<', found)[-1] == ("100.00", "100")
    flat = chart("Loss", [Line(9, "b", [Point(7, 0.5)])], even=0.5)
    assert 'class="c1 d1 dots"' in flat and "nan" not in flat.lower()


def test_no_peak_is_lost_when_a_curve_is_made_thin():
    values = torch.rand(20_000).tolist()
    values[12_345], values[7_777] = 9.0, -9.0
    curve = [Point(step, value) for step, value in enumerate(values, start=1)]
    thin = thinned(curve, 100)
    assert len(thin) <= 400 and thin == sorted(thin) and set(thin) <= set(curve)
    assert {thin[0], thin[-1], Point(12_346, 9.0), Point(7_778, -9.0)} <= set(thin) and thin[0] == curve[0]
    assert [curve[-1]] == thin[-1:]
    for part in range(100):  # of every part the extremes
        inside = [point for point in curve if (point.step - 1) * 100 // 20_000 == part]
        assert {min(inside, key=lambda p: p.value), max(inside, key=lambda p: p.value)} <= set(thin)
    assert thinned(curve[:300], 100) == curve[:300]
    means = averaged(curve, 10)
    assert len(means) == 10 and means[3].value == pytest.approx(sum(values[6000:8000]) / 2000)


def test_thousands_of_lines_are_read_and_drawn_quickly(tmp_path):
    lines = 20_000
    losses = (0.7 - 0.1 * torch.rand(lines)).tolist()
    run = made.run(tmp_path / "a", steps=lines, lines=lines, losses=losses)
    started = time.perf_counter()
    text = page(seen(run), "today")
    assert time.perf_counter() - started < 20 and len(text) < 400_000
    assert last_step(run / "metrics.jsonl") == lines
    log = read_log(run / "metrics.jsonl", ("loss",))
    assert len(log.curves["loss"]) == lines and log.step == lines and log.unusable == 0


# ---- real runs ---------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.slow
def test_real_runs_are_compared(tmp_path, capfd):
    """The built-in world: two seeds and another beta, trained and evaluated for a moment, and one of them again."""
    base = ["--preset", "shapes", "--no-prove", "--max_train_steps", "4", "--eval_images", "24", "--log_every", "1"]
    base += ["--run_validation", "--validation_fraction", "0.1", "--sampling_steps", "2", "--eval_scorers", "appeal"]
    base += ["--latent_cache_dir", str(tmp_path / "cache")]
    from dpo_fast.evaluate import main as evaluate
    from dpo_fast.train import main as train

    for name, more in {
        "a-1": ["--seed", "1"],
        "a-2": ["--seed", "2"],
        "hot": ["--seed", "1", "--beta_dpo", "50"],
    }.items():
        assert train([*base, *more, "--output_dir", str(tmp_path / name)]) == 0
    later = ["--policy", str(tmp_path / "a-1"), "--output_dir", str(tmp_path / "later")]
    assert evaluate(later) == 0
    capfd.readouterr()
    runs = [tmp_path / name for name in ("a-1", "a-2", "hot", "later")]
    found = seen(*runs)
    assert found.incomparable == [] and found.missing == []
    assert cells(found, "beta_dpo") == {"a-1": "2000", "a-2": "2000", "hot": "50", "later": "2000"}
    # the evaluation of a run, made again, is that of its training
    assert cells(found, "win_rate_difference", "appeal")["later"] == (0, 0, 0)
    assert cells(found, "wins_over_reference", "appeal")["later"] == (0.5, 0.5, 0.5)
    summary = json.loads((tmp_path / "hot" / "summary.json").read_text())
    assert cells(found, "win_rate", "appeal")["hot"].value == summary["win_rate"]
    assert [row.name for row in seen(*runs, pool_seeds=True).rows] == ["a (2 seeds)", "hot", "later"]
    assert compare([*map(str, runs), "--pool", "seed", "--page", str(tmp_path / "page.html")]) == 0
    out = capfd.readouterr().out
    assert "a (2 seeds)" in out and max(map(len, out.splitlines()[:-1])) <= 80
