"""A self-contained HTML page for an evaluation: charts, tables and pairs of images; nothing is loaded from outside."""

import json
from html import escape
from pathlib import Path

from dpo_fast.evaluation.conclusion import NOTHING
from dpo_fast.evaluation.findings import About, Findings, Verdict, alpha
from dpo_fast.evaluation.formats import counted, decimals, p_value
from dpo_fast.evaluation.implicit import ImplicitAccuracy
from dpo_fast.evaluation.people import ENOUGH_RULE
from dpo_fast.evaluation.report.charts import bars, legend
from dpo_fast.evaluation.report.gallery import (
    LOSSLESS,
    Compared,
    Gallery,
    Role,
    Shown,
    Thumbnail,
    choose,
    extremes,
    thumbnails,
)
from dpo_fast.evaluation.report.html import document, facts, minus, notes, section, table, text, with_interval
from dpo_fast.evaluation.scored import Scored
from dpo_fast.evaluation.signals import Images, Signal

MAX_BYTES = 13_000_000  # of all images in the page
AT_THE_TOP = 4  # pairs beside the verdict: so many of the largest gains, and of the largest losses
TITLES = {"best": "Largest gains by {}", "worst": "Largest losses by {}", "random": "Drawn at random"}


def page(
    findings: Findings,
    scored: Scored,
    base: Images,
    policy: Images,
    *,
    implicit: ImplicitAccuracy | None = None,  # None: not measured
    max_pairs: int = 96,
    thumbnail: int = 448,  # longest side of an image, pixels; smaller if all would exceed `max_bytes`
    max_bytes: int = MAX_BYTES,
    seed: int = 0,  # of the pairs drawn at random
) -> str:
    """Return the page as text, to be written as UTF-8. `findings` are of `scored`; the images are in its row order."""
    shown = choose(scored, max_pairs, seed)
    gains, losses = (rows[:AT_THE_TOP] for rows in extremes(scored, findings.overall[0].scorer))
    rows = list(dict.fromkeys([*(one.row for one in shown), *gains, *losses]))
    gallery = thumbnails(base, policy, rows, [*gains, *losses], size=thumbnail, max_bytes=max_bytes)
    about = findings.about
    body = [
        _head(findings),
        section("What changed", _changes(findings, scored, gains, losses, gallery), "changes"),
        section("Win rates", _win_rates(findings)),
        section("People's votes", _people(findings), "people") if findings.people else "",
        section("Scores", _scores(findings.overall)),
        section("By category", _by_category(findings)) if findings.by_category else "",
        section("Signs of over-optimisation", _signals(findings.signals)) if findings.signals else "",
        section("Implicit reward", _implicit(implicit)) if implicit else "",
        section("Pairs", _pairs(findings, scored, shown, gallery, seed), "pairs") if shown else "",
        section("Settings", _settings(findings)),
        f"<footer><p>Made by dpo_fast, {text(about.date)}. The scores of all pairs are in scores.parquet, all numbers"
        " in summary.json.</p></footer>",
    ]
    return document(
        f"{about.policy} against {about.base}",
        body,
        made_by="dpo_fast.evaluate",
        style=[_beside("page.css")],
        script=_beside("page.js").read_text(encoding="utf-8"),
    )


def _head(findings: Findings) -> str:
    about, first, verdict = findings.about, findings.overall[0], findings.conclusion
    people = findings.people and findings.people.verdict
    what = "prompts, by the median of their images," if findings.medians_compared else "pairs"
    rate = f"<strong>{first.interval.value:.1%}</strong> of {what} won by the policy, ties counted half"
    if people:
        rate = f"<strong>{people.win_rate.value:.1%}</strong> of pairs won by the policy in people's votes, ties half"
    kind = {"worse": "worse", NOTHING: "open"}.get(verdict.outcome, "better")
    cost = f"; <mark>{text(verdict.cost.replace('->', '→'))}</mark>" if verdict.cost else ""
    remedy = f"; {text(verdict.remedy)}" if verdict.remedy else ""
    return (
        f'<header>\n<p class="kind">Evaluation, {text(about.date)}</p>\n'
        f'<h1><span class="policy">{text(about.policy)}</span> <small>against</small>'
        f' <span class="base">{text(about.base)}</span></h1>\n'
        f'<div class="lead {kind}"><p>{rate}</p><p><b>{text(verdict.outcome.capitalize())}</b>,'
        f" {text(verdict.grounds)}{cost}{remedy}.</p></div>\n</header>"
    )


def _changes(findings: Findings, scored: Scored, gains: list[int], losses: list[int], gallery: Gallery) -> str:
    """Render the pairs with the largest gains by the scorer that decides, and behind a click those with the largest
    losses: base, policy, what changed."""
    scorer, number = findings.overall[0].scorer, len(scored.prompts)
    gain = scored.gain(scorer)
    won, lost = int((gain > 0).sum()), int((gain < 0).sum())

    def cards(rows: list[int]) -> str:
        return f'<div class="moved">{"".join(_moved(scored, scorer, row, gallery) for row in rows)}</div>'

    pairs = f"{counted(number, 'pair')} of {counted(findings.overall[0].prompts, 'prompt')}"
    split = f"{won} gained, {lost} lost" + (f", {number - won - lost} tied" if won + lost < number else "")
    best = f"The {counted(len(gains), 'largest gain')} by {scorer}, a prompt at most once, of" if gains else "Of"
    factor = f" Difference: how far each pixel moved, times {gallery.factor}; black did not move." if won + lost else ""
    return (
        f'<p class="hint">{text(f"{best} {pairs}: {split}.{factor}")}</p>'
        + cards(gains) * bool(gains)
        + (
            f'<details class="losses"><summary>The {counted(len(losses), "largest loss", "es")} by {text(scorer)}'
            f"</summary>{cards(losses)}</details>"
        )
        * bool(losses)
    )


def _moved(scored: Scored, scorer: str, row: int, gallery: Gallery) -> str:
    pair, prompt = gallery.pairs[row], scored.prompts[row]
    sides = {"base": pair.base, "policy": pair.policy, f"difference x {gallery.factor}": pair.changed}
    figures = "".join(
        f"<figure><figcaption>{name}</figcaption>{_image(image, f'{name}: {prompt}')}</figure>"
        for name, image in sides.items()
        if image is not None
    )
    return (
        f'<div><div class="beside">{figures}</div><p class="prompt" dir="auto">{text(prompt)}</p>'
        f'<table class="mini">{_card_row(scored, scorer, row)}</table></div>'
    )


def _image(image: Thumbnail, words: str) -> str:
    kind = "tiny" if max(image[1:]) <= LOSSLESS else "photo"
    return f'<img src="{image.uri}" width="{image.width}" height="{image.height}" class="{kind}" alt="{text(words)}">'


def _settings(findings: Findings) -> str:
    about = findings.about
    known = {
        "Prompts": f"{findings.overall[0].prompts} of {about.prompt_set}",
        "Images": f"{findings.images} of each",
        "Scorers": ", ".join(verdict.scorer for verdict in findings.overall),
    }
    return facts(known | about.settings | _provenance(about))


def _provenance(about: About) -> dict[str, str]:
    """The revisions of the models and scorers used, one row each."""
    rows = {f"Files, {title}": _revisions(files) for title, files in about.models.items()}
    for name, of in about.scorers.items():
        others = (f"{key} {value}" for key, value in of.items() if key != "revisions")
        rows[f"Scorer {name}"] = ", ".join(filter(None, (_revisions(of["revisions"]), *others)))
    return rows


def _revisions(files: dict[str, str]) -> str:
    return ", ".join(f"{place} @ {revision}" for place, revision in files.items())


def _win_rates(findings: Findings) -> str:
    decided_by_people = findings.people is not None and findings.people.verdict is not None
    decides = ", decides" if len(findings.overall) > 1 and not decided_by_people else ""
    chart = bars([(v.scorer, f"{_of_prompts(v)}{'' if k else decides}", v) for k, v in enumerate(findings.overall)])
    head = ("Scorer", "p", "Won : tied : lost", "Won, without ties", "p of the sign test")
    rows = [
        [
            text(v.scorer),
            escape(p_value(v.rate_p_holm)),
            " : ".join(map(str, v.won)),
            with_interval(v.exact, ".3f"),
            escape(p_value(v.p_holm)),
        ]
        for v in findings.overall
    ]
    lines = [
        *findings.notes(),
        "won, without ties: share of prompts, with its exact 95% interval (Clopper-Pearson); the sign test is of won"
        " against lost, two-sided, corrected as p is",
    ]
    return f"{legend()}{chart}{table(head, rows)}{notes(lines)}"


def _scores(overall: list[Verdict]) -> str:
    head = ("Scorer", "Median, base", "Median, policy", "Mean, base", "Mean, policy", "Gain of the mean")
    rows = []
    for v in overall:
        levels = v.base_median, v.policy_median, v.base_mean, v.policy_mean
        form = f".{decimals(*(of.value for of in levels))}f"
        cells = [with_interval(of, form) for of in levels]
        rows.append([text(v.scorer), *cells, with_interval(v.gain, f"+.{decimals(*v.gain, digits=3)}f")])
    return table(head, rows) + '<p class="hint">With 95% intervals by the bootstrap over prompts.</p>'


def _people(findings: Findings) -> str:
    """Render the win rates by people's votes, and how far the scorers agree with them."""
    people = findings.people
    opinions, summary = people.opinions, people.summary["questions"]
    decides = people.verdict
    chart = bars(
        [(name, f"{people.questions[name]}{', decides' if of is decides else ''}", of) for name, of in opinions.items()]
    )
    rows = [
        [
            text(name),
            with_interval(of.by_votes, ".3f"),
            f"{of.comparisons} of {len(people.asked)}<small>{of.undecided} short of {people.wanted} votes</small>",
            str(of.votes),
            text(alpha(summary[name])),
        ]
        for name, of in opinions.items()
    ]
    agreement = [
        [
            text(scorer),
            *(
                f"{with_interval(of.share, '.3f')}<small>{counted(of.pairs, 'pair')}</small>" if of.share else "no pair"
                for of in (by_question[name] for name in opinions)
            ),
        ]
        for scorer, by_question in findings.agreement.items()
    ]
    return (
        f'<p class="hint">{counted(people.summary["votes"], "vote")} by {counted(people.voters, "voter")}. Win rate by'
        f" majority: {text(people.summary['rule'])}. 95% intervals over prompts and voters; {text(ENOUGH_RULE)}."
        f"{''.join(f' {text(note)}.' for note in people.notes)}</p>"
        f"{legend()}{chart}"
        + table(("Question", "Share of votes", "Comparisons", "Votes", "Krippendorff's alpha"), rows)
        + "<h3>How far the scorers agree with people</h3>"
        + table(("Scorer", *opinions), agreement)
        + '<p class="hint">The share of pairs on which a scorer prefers the image that most people prefer, ties of'
        " either left aside; 0.5 is chance. 95% intervals by the bootstrap over prompts.</p>"
    )


def _by_category(findings: Findings) -> str:
    parts = []
    for place, leader in enumerate(findings.overall):
        of_scorer = [v for v in findings.by_category if v.scorer == leader.scorer]
        chart = bars([(v.category, _of_prompts(v), v) for v in of_scorer])
        parts.append(f"<details{'' if place else ' open'}><summary>{text(leader.scorer)}</summary>{chart}</details>")
    return legend() + "".join(parts)


def _of_prompts(verdict: Verdict) -> str:
    return counted(verdict.prompts, "prompt")


def _signals(signals: list[Signal]) -> str:
    rows = []
    for s in signals:
        name = f"{text(s.name)}<small>{text(s.meaning)}</small>"
        if s.base is None:
            rows.append([name, "", with_interval(s.difference, f".{decimals(s.policy)}f"), ""])
        else:
            levels = [f"{of:.{decimals(s.base, s.policy)}f}" for of in (s.base, s.policy)]
            rows.append([name, *levels, with_interval(s.difference, f"+.{decimals(*s.difference, digits=3)}f")])
    return table(("Measure", "Base", "Policy", "Difference"), rows)


def _implicit(found: ImplicitAccuracy) -> str:
    """Render how well the policy ranks people's choices by itself."""
    levels = [(level.name, counted(level.pairs, "pair"), level) for level in found.levels]
    chart = bars([("all draws", f"the mean margin of {found.draws}", found), *levels], "accuracy")
    rows = [
        ["At one draw<small>what training logs as implicit_accuracy</small>", with_interval(found.one_draw, ".3f")],
        *(
            [f"{side} image<small>policy minus reference error</small>", with_interval(delta, "+.3g")]
            for side, delta in (("Chosen", found.chosen_delta), ("Rejected", found.rejected_delta))
        ),
    ]
    if found.margin is not None:
        rows.append([f"Margin<small>mean, at beta {found.beta:g}</small>", with_interval(found.margin, "+.3g")])
    of = f"{counted(found.pairs, 'held-out pair')} of {counted(found.captions, 'caption')}"
    return (
        f'<p class="hint">The share of {of} whose chosen image has the higher implicit reward, ties counted half'
        f" ({counted(found.ties, 'tie')}); 0.5 is chance. 95% intervals by the bootstrap over captions.</p>"
        f"{chart}{table(('', 'Mean'), rows)}"
    )


def _pairs(
    findings: Findings,
    scored: Scored,
    shown: list[Shown],
    gallery: Gallery,
    seed: int,
) -> str:
    groups: dict[tuple[str, str | None], list[str]] = {}
    scorers, categories = scored.scorers, findings.categories
    for one in shown:
        first = next(iter(one.roles))
        card = _card(one, scored, gallery.pairs[one.row], scorers, categories)
        groups.setdefault((first.kind, first.scorer), []).append(card)
    sections = [
        f'<section class="group"><h3>{text(TITLES[kind].format(scorer))}</h3><div class="cards">{"".join(cards)}</div>'
        "</section>"
        for (kind, scorer), cards in groups.items()
    ]
    return (
        f'<p class="hint">{len(shown)} of {len(scored.prompts)} pairs, at most {gallery.size} pixels wide or high here.'
        " Best and worst: the largest gain and loss of the policy's score over the base's on the same prompt and seed."
        f" Random: drawn with seed {seed}, whatever the scores.</p>{_toolbar(scorers, categories)}"
        f'<div id="groups">{"".join(sections)}</div>'
    )


def _toolbar(scorers: list[str], categories: list[str]) -> str:
    """Render the toolbar, hidden until the script that serves it runs."""
    of_scorer = "".join(f'<option value="{k}">{text(name)}</option>' for k, name in enumerate(scorers))
    of_category = "".join(f'<option value="{k}">{text(name)}</option>' for k, name in enumerate(categories))

    def choice(name: str, options: dict[str, str]) -> str:
        buttons = "".join(
            f'<label><input type="radio" name="{name}" value="{value}"{"" if place else " checked"}><span>{text}</span>'
            "</label>"
            for place, (value, text) in enumerate(options.items())
        )
        return f'<fieldset><legend>{name.capitalize()}</legend><div class="choice">{buttons}</div></fieldset>'

    return (
        '<form id="toolbar" hidden>'
        + choice("show", {"best": "Best", "worst": "Worst", "random": "Random"})
        + f'<label class="select">Scorer<select name="scorer">{of_scorer}</select></label>'
        + (
            f'<label class="select">Category<select name="category"><option value="">all</option>{of_category}</select>'
            "</label>"
            if categories
            else ""
        )
        + choice("view", {"beside": "Side by side", "slider": "Slider"})
        + '<output id="count"></output></form>'
    )


def _card(one: Shown, scored: Scored, pair: Compared, scorers: list[str], categories: list[str]) -> str:
    def key(role: Role) -> str:  # as page.js looks it up
        scorer = "" if role.scorer is None else scorers.index(role.scorer)
        category = "" if role.category is None else categories.index(role.category)
        return f"{role.kind}.{scorer}.{category}"

    prompt = scored.prompts[one.row]
    places = escape(json.dumps({key(role): place for role, place in one.roles.items()}))
    figures = "".join(
        f'<figure class="{name}">{_image(image, f"{name}: {prompt}")}<figcaption>{name}</figcaption></figure>'
        for name, image in (("base", pair.base), ("policy", pair.policy))
    )
    category = f"<bdi>{text(scored.categories[one.row])}</bdi> · " if scored.categories else ""
    rows = "".join(_card_row(scored, scorer, one.row) for scorer in scorers)
    return (
        f'<article data-places="{places}"><div class="frames">{figures}</div>'
        f'<p class="prompt" dir="auto">{text(prompt)}</p>'
        f'<p class="hint">{category}seed {scored.seeds[one.row]}</p><table class="mini">{rows}</table></article>'
    )


def _card_row(scored: Scored, scorer: str, row: int) -> str:
    before, after = scored.base[scorer][row].item(), scored.policy[scorer][row].item()
    places = decimals(scored.base[scorer].abs().max().item(), scored.policy[scorer].abs().max().item())
    kind, sign = ("win", "▲") if after > before else ("loss", "▼") if after < before else ("tie", "=")
    return (
        f'<tr><th scope="row">{text(scorer)}</th><td>{minus(f"{before:.{places}f} → {after:.{places}f}")}</td>'
        f'<td class="{kind}">{sign} {abs(after - before):.{places}f}</td></tr>'
    )


def _beside(name: str) -> Path:
    return Path(__file__).with_name(name)
