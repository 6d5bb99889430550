"""The findings of an evaluation, for summary.json, the terminal and the report page."""

import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from dpo_fast.errors import printable
from dpo_fast.evaluation.conclusion import Conclusion, conclude
from dpo_fast.evaluation.formats import counted, decimals, difference, p_value
from dpo_fast.evaluation.people import ENOUGH_RULE, Agreement, People
from dpo_fast.evaluation.scored import Scored
from dpo_fast.evaluation.signals import Signal
from dpo_fast.plain_table import plain_table, side_by_side
from dpo_fast.statistics import (
    RESAMPLES,
    Bootstrap,
    Counts,
    Interval,
    WinRate,
    binomial_interval,
    by_prompt,
    holm,
    median_of_prompt,
    outcomes,
    sign_test,
    win_rate,
)

# what an evaluation's folder holds, besides `scored.SCORES`: what is compared, the findings, and the page
RECORD, SUMMARY, REPORT = "evaluation.json", "summary.json", "report.html"
FEW = 20  # prompts: with fewer, intervals are rough
UNEVEN = 0.75  # effective prompts per prompt: below this, a note says so
# settings of the sampler: if these differ between two models, a comparison is not of weights alone
SAMPLING = ("family", "sampler", "steps", "guidance", "resolution", "layout", "strength")
WIDTH = 110  # columns that notes and tables are wrapped to in the terminal


@dataclass(frozen=True)
class About:
    """What was compared, as the caller describes it."""

    base: str
    policy: str
    prompt_set: str
    date: str
    settings: dict[str, str]  # sampler, steps, guidance, versions ...: name -> value, in this order
    remarks: list[str] = field(default_factory=list)  # on what was compared, one line each, shown with the notes
    trained_towards_the_first: bool = False  # the policy was trained from this base, towards the first scorer
    models: dict[str, dict[str, str]] = field(default_factory=dict)  # base, policy -> path or repository -> revision
    scorers: dict[str, dict[str, object]] = field(default_factory=dict)  # `scorers.provenance` of each


@dataclass(frozen=True)
class Verdict:
    """One scorer's verdict on the images of all prompts, or of those of one category."""

    scorer: str
    category: str | None  # None: all
    prompts: int  # distinct
    compared: int  # pairs of images; prompts if the medians of their images are compared
    effective_prompts: float  # number of equally sized prompts that say as much about the win rate
    win_rate: WinRate  # of `compared`
    won: Counts  # prompts won, tied and lost
    exact: Interval  # share of won prompts among those not tied, Clopper-Pearson
    p: float  # two-sided sign test of the same prompts
    p_holm: float  # Holm-corrected for all scorers; by category, for all scorers and categories
    rate_p: float  # two-sided, of the win rate against 0.5, by the formula of its interval
    rate_p_holm: float  # corrected as `p_holm` is
    base_median: Interval
    policy_median: Interval
    base_mean: Interval
    policy_mean: Interval
    gain: Interval  # mean of policy minus base

    @property
    def interval(self) -> Interval:
        """The win rate with its interval."""
        return Interval(*self.win_rate[:3])

    @property
    def decided(self) -> bool:
        """Whether the interval excludes 0.5."""
        return not self.interval.low <= 0.5 <= self.interval.high

    def for_summary(self) -> dict[str, object]:
        """Return JSON-ready values; `base` and `policy` are the means, as at the end of a training run."""
        found = {key: value._asdict() if hasattr(value, "_asdict") else value for key, value in vars(self).items()}
        found |= {"name": found.pop("scorer"), "base": self.base_mean.value, "policy": self.policy_mean.value}
        if self.category is None:
            del found["category"]
        return found


@dataclass(frozen=True)
class Findings:
    """All findings of an evaluation. `overall` is in the order in which the scorers were given: the first one leads."""

    about: About
    overall: list[Verdict]
    by_category: list[Verdict]  # category by category, each in the order of the scorers; empty without categories
    signals: list[Signal]
    images: int  # pairs of images
    medians_compared: bool  # medians of each prompt's images, rather than image by image
    resamples: int
    people: People | None = None  # who voted on the same images; None: nobody
    agreement: Mapping[str, Mapping[str, Agreement]] = field(default_factory=dict)  # scorer -> question -> with people

    def with_people(self, people: People | None, scored: Scored) -> "Findings":
        """The same with what people voted. scored: what these findings are of."""
        if people is None or not people.votes:
            return self
        agreement = {
            name: {question: people.agreement(scored, name, question) for question in people.opinions}
            for name in scored.scorers
        }
        return replace(self, people=people, agreement=agreement)

    @property
    def categories(self) -> list[str]:
        return list(dict.fromkeys(v.category for v in self.by_category))

    def of(self, category: str) -> list[Verdict]:
        return [verdict for verdict in self.by_category if verdict.category == category]

    def notes(self) -> list[str]:
        """How to read the numbers, one line each."""
        what, how = ("medians of a prompt's images", "median") if self.medians_compared else ("images", "majority")
        lines = [
            f"win rate: share of {what} won by the policy, ties half; intervals: bootstrap over prompts"
            f" ({self.resamples} resamples), of win rates by Wilson's formula",
            f"p: of the win rate against 0.5, two-sided, by the formula of its interval, Holm-corrected for"
            f" {counted(len(self.overall), 'scorer')}",
            f"won, tied, lost: prompts, by the {how} of their images",
        ]
        few = [c for c in self.categories if self.of(c)[0].prompts < FEW]
        prompts = self.overall[0].prompts
        if prompts == 1:
            lines.append("only 1 prompt: intervals are over its images, and say nothing of other prompts")
        elif prompts < FEW:
            lines.append(f"only {prompts} prompts: intervals are rough")
        elif few:
            lines.append(f"fewer than {FEW} prompts, so intervals are rough: {', '.join(few)}")
        first = self.overall[0]
        if first.effective_prompts < UNEVEN * prompts and prompts > 1:
            lines.append(
                f"prompts have very different numbers of images: the {prompts} prompts carry the information of"
                f" {first.effective_prompts:.1f} equally sized ones; the intervals account for this; --compare medians"
                " weights prompts equally"
            )
        if self.people is not None:
            lines += self._notes_on_people()
        return lines + self.about.remarks

    def _notes_on_people(self) -> list[str]:
        people = self.people
        lines = [f"people: {people.summary['rule']}; intervals over prompts and voters", *people.notes]
        if people.verdict is None:
            said = people.opinions.get(people.leading)
            number = 0 if said is None else said.prompts
            lines.append(
                f"{counted(number, 'prompt')} {'has' if number == 1 else 'have'} all {people.wanted} votes on"
                f" {people.leading}: {ENOUGH_RULE}; until then {self.overall[0].scorer} does"
            )
        return lines

    @property
    def conclusion(self) -> Conclusion:
        """The verdict of the first scorer, in a sentence, with all that the policy paid for it."""
        return conclude(self.overall, self.signals, trained=self.about.trained_towards_the_first, people=self.people)

    def warnings(self) -> list[str]:
        """Signs that the policy was degraded rather than aligned, one line each."""
        first, trained, found = self.overall[0], self.about.trained_towards_the_first, []
        for v in self.overall:
            if v.interval.high >= 0.5:
                continue
            lost = f"the policy loses on {v.scorer}: win rate {v.interval}"
            if trained and v is first:
                lost = (
                    f"over-optimisation: {lost}, though it was trained towards it; raise --beta_dpo, lower"
                    " --learning_rate, take fewer steps"
                )
            elif trained and first.interval.high >= 0.5:
                lost = f"{v.scorer} got worse: win rate {v.interval}"
            found.append(lost)
        return found + [warning for signal in self.signals if (warning := signal.warning())]

    def for_summary(self) -> dict[str, object]:
        """The content of an evaluation's own summary.json."""
        return {
            "about": asdict(self.about),
            **self.numbers(),
            "notes": self.notes(),
        }

    def numbers(self) -> dict[str, object]:
        """The values that a training run also adds to its own summary.json, under the same keys."""
        first = self.overall[0]
        diversity = next((s for s in self.signals if s.name == "diversity"), None)
        return {
            "verdict": self.conclusion.for_summary(),
            "scorer": first.scorer,
            "win_rate": first.win_rate.rate,
            "win_rate_ci95": [first.interval.low, first.interval.high],
            "score_base": first.base_mean.value,
            "score_policy": first.policy_mean.value,
            "prompts": first.prompts,
            "images": self.images,
            "medians_compared": self.medians_compared,
            "resamples": self.resamples,
            "diversity_base": diversity.base if diversity else None,
            "diversity_policy": diversity.policy if diversity else None,
            "scores": {verdict.scorer: verdict.for_summary() for verdict in self.overall},
            "categories": {c: {v.scorer: v.for_summary() for v in self.of(c)} for c in self.categories},
            "settings": self.about.settings,
            "models": self.about.models,
            "scorers": self.about.scorers,
            "signals": {s.name: asdict(s) | {"difference": s.difference._asdict()} for s in self.signals},
            "warnings": self.warnings(),
            **({} if self.people is None else {"people": self._people()}),
        }

    def _people(self) -> dict[str, object]:
        """`tally.summary_of` the votes, and how far each scorer agrees with them."""
        agreement = {
            scorer: {
                question: {
                    "share": of.share and of.share.value,
                    "ci95": of.share and [*of.share[1:]],
                    "pairs": of.pairs,
                    "tied": of.tied,
                }
                for question, of in by_question.items()
            }
            for scorer, by_question in self.agreement.items()
        }
        return self.people.summary | {"decides": self.people.verdict is not None, "agreement": agreement}

    def __str__(self) -> str:
        """Text for the terminal; the exact intervals and the medians are on the page and in summary.json."""
        about, first = self.about, self.overall[0]
        parts = [
            f"{printable(about.policy)} against {printable(about.base)}\n{printable(about.prompt_set)}:"
            f" {counted(first.prompts, 'prompt')}, {counted(self.images, 'image')} of each",
            plain_table(
                ["scorer", "win rate [95%]", "p", "won", "tied", "lost", "base", "policy", "gain [95%]"],
                [
                    [v.scorer, str(v.interval), p_value(v.rate_p_holm), *map(str, v.won), *_scores(v)]
                    for v in self.overall
                ],
            ),
        ]
        if self.people is not None:
            parts += self._people_tables()
        if self.by_category:
            parts += self._category_tables()
        if self.signals:
            parts.append(
                plain_table(["signal", "base", "policy", "difference [95%]"], [_signal(s) for s in self.signals])
            )
        over = "medians of prompts" if self.medians_compared else "images"
        notes = [*self.notes(), f"base, policy: means over {over}; gain: policy minus base"]
        parts.append("\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in notes))
        parts.append(textwrap.fill(f"verdict: {printable(str(self.conclusion))}", WIDTH, subsequent_indent="  "))
        return "\n\n".join(parts)

    def _people_tables(self) -> list[str]:
        """Win rates by people's votes, and how far the scorers agree with them."""
        opinions, summary = self.people.opinions, self.people.summary["questions"]
        votes = [
            [
                name,
                str(of.win_rate),
                str(of.by_votes),
                str(of.comparisons),
                str(of.undecided),
                str(of.votes),
                alpha(summary[name]),
            ]
            for name, of in opinions.items()
        ]
        head = ["people", "win rate [95%]", "share of votes [95%]", "comparisons", "undecided", "votes", "alpha"]
        agreement = [
            [scorer, *(agreed(by_question[name]) for name in opinions)]
            for scorer, by_question in self.agreement.items()
        ]
        return [plain_table(head, votes), plain_table(["agrees with people", *opinions], agreement)]

    def _category_tables(self) -> list[str]:
        """Win rates by category: as many scorers side by side as fit into WIDTH, the others below."""
        head = ["category", "prompts", *(verdict.scorer for verdict in self.overall)]
        rows = [
            [c, str(self.of(c)[0].prompts), *(str(verdict.interval) for verdict in self.of(c))] for c in self.categories
        ]
        return [side_by_side(head, rows, fixed=2, width=WIDTH)]


def judge(
    scored: Scored,
    signals: list[Signal],
    about: About,
    *,
    compare_medians: bool = False,  # of each prompt's images (the published way with several), not image by image
    resamples: int = RESAMPLES,
) -> Findings:
    """Compare all scores, overall and by category."""
    overall = _verdicts(scored, None, compare_medians, resamples)
    by_category = []
    for category in dict.fromkeys(scored.categories or []):
        rows = [row for row, of_row in enumerate(scored.categories) if of_row == category]
        by_category += _verdicts(scored.of_rows(rows), category, compare_medians, resamples)
    return Findings(
        about, _corrected(overall), _corrected(by_category), signals, len(scored.prompts), compare_medians, resamples
    )


def _verdicts(scored: Scored, category: str | None, compare_medians: bool, resamples: int) -> list[Verdict]:
    distinct = list(dict.fromkeys(scored.prompts))
    prompts = distinct if compare_medians else scored.prompts
    bootstrap, found = Bootstrap(prompts, resamples), []
    for scorer in scored.scorers:
        base, policy = scored.base[scorer].double(), scored.policy[scorer].double()
        if compare_medians:
            base, policy = (median_of_prompt(values, scored.prompts) for values in (base, policy))
        won = by_prompt(base, policy, prompts)
        p, rate_p = sign_test(won.wins, won.losses), bootstrap.p_of_share(outcomes(base, policy))
        found.append(
            Verdict(
                scorer,
                category,
                prompts=len(distinct),
                compared=len(prompts),
                effective_prompts=bootstrap.effective,
                win_rate=win_rate(base, policy, prompts, bootstrap),
                won=won,
                exact=binomial_interval(won.wins, won.wins + won.losses),
                p=p,
                p_holm=p,
                rate_p=rate_p,
                rate_p_holm=rate_p,
                base_median=bootstrap.median(base),
                policy_median=bootstrap.median(policy),
                base_mean=bootstrap.mean(base),
                policy_mean=bootstrap.mean(policy),
                gain=bootstrap.mean(policy - base),
            )
        )
    return found


def _corrected(verdicts: list[Verdict]) -> list[Verdict]:
    signs, rates = holm([v.p for v in verdicts]), holm([v.rate_p for v in verdicts])
    return [replace(v, p_holm=sign, rate_p_holm=rate) for v, sign, rate in zip(verdicts, signs, rates, strict=True)]


def _scores(verdict: Verdict) -> list[str]:
    """Both means, and the gain with its interval."""
    means = verdict.base_mean.value, verdict.policy_mean.value
    return [*(f"{mean:.{decimals(*means)}f}" for mean in means), difference(verdict.gain)]


def alpha(of: Mapping[str, object]) -> str:
    """Krippendorff's alpha of one question of a tally, with its interval."""
    if of["alpha"] is None:
        return "none"
    return str(Interval(of["alpha"], *of["alpha_ci95"])) if of["alpha_ci95"] else f"{of['alpha']:.3f}"


def agreed(of: Agreement) -> str:
    """How often a scorer agrees with people, and on how many pairs both decide."""
    return "no pair" if of.share is None else f"{of.share} of {of.pairs}"


def _signal(signal: Signal) -> list[str]:
    if signal.base is None:
        places, of = decimals(signal.policy), signal.difference
        return [signal.name, "", f"{of.value:.{places}f}", f"[{of.low:.{places}f}, {of.high:.{places}f}]"]
    places = decimals(signal.base, signal.policy)
    return [signal.name, f"{signal.base:.{places}f}", f"{signal.policy:.{places}f}", difference(signal.difference)]
