"""Summaries side by side, for the terminal."""

from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from turnwise.analysis.contribution import Contribution
from turnwise.analysis.control import Control
from turnwise.analysis.evaluation import Difference, Evaluation
from turnwise.analysis.papers import Printed
from turnwise.analysis.statistics import Estimate
from turnwise.environments.environment import Outcome
from turnwise.environments.episode import Episode
from turnwise.rl.cold_start.thoughts import Dropped
from turnwise.rl.summary import Summary, accuracy_efficiency_score, by_level, summarise


def comparison(runs: Mapping[str, Sequence[Episode]], *, baseline: str, title: str = "") -> Table:
    """One row a run: accuracy with its 95% interval, tokens of each seat, turns, think share, AES against `baseline`.

    Tokens are sampled tokens an episode. AES is left out where the baseline answered nothing right.
    """
    summaries = {name: summarise(episodes) for name, episodes in runs.items()}
    seats = sorted({seat for summary in summaries.values() for seat in summary.seat_tokens})
    routed = any(summary.think_share is not None for summary in summaries.values())
    table = Table(title=escape(title), title_justify="left")
    table.add_column("")
    headings = ["right", "95% interval", "tokens", *(map(escape, seats) if len(seats) > 1 else []), "turns"]
    for heading in [*headings, *(["thinks"] if routed else []), "AES"]:
        table.add_column(heading, justify="right")
    for name, summary in summaries.items():
        low, high = summary.interval
        cells = [f"{summary.accuracy:.1%}", f"{low:.1%} to {high:.1%}", f"{summary.tokens:.1f}"]
        if len(seats) > 1:
            cells += [f"{summary.seat_tokens[seat]:.1f}" if seat in summary.seat_tokens else "" for seat in seats]
        cells.append(f"{summary.turns:.1f}")
        if routed:
            cells.append("" if summary.think_share is None else f"{summary.think_share:.0%}")
        table.add_row(escape(name), *cells, _aes(summary, summaries[baseline]))
    return table


def levels(runs: Mapping[str, Sequence[Episode]], *, title: str = "") -> Table:
    """One row a level: accuracy and tokens of each run."""
    tables = {name: by_level(episodes) for name, episodes in runs.items()}
    table = Table(title=escape(title), title_justify="left")
    table.add_column("level", justify="right")
    for name in tables:
        table.add_column(escape(name), justify="right")
    for level in sorted({level for summaries in tables.values() for level in summaries}):
        cells = (summaries.get(level) for summaries in tables.values())
        table.add_row(str(level), *(f"{s.accuracy:.0%} in {s.tokens:.0f}" if s else "" for s in cells))
    return table


def evaluations_logged(logged: Mapping[str, Mapping[str, float]], *, title: str = "") -> Table:
    """One row an evaluation of a training run, of the figures that were logged with it; AES is against the first."""
    from turnwise.rl.metrics import SHARE  # torch: only where something was trained

    modes = sorted({name for figures in logged.values() for name in figures if name.startswith(f"evaluation/{SHARE}")})
    table = Table(title=escape(title), title_justify="left")
    headings = ["step", "right", "tokens", "turns", *(name.removeprefix(f"evaluation/{SHARE}") for name in modes)]
    for heading in ["", *headings, "AES"]:
        table.add_column(escape(heading), justify="right" if heading else "left")
    for name, figures in logged.items():
        right, tokens, turns, aes = (figures[f"evaluation/{figure}"] for figure in ("right", "tokens", "turns", "aes"))
        shares = (f"{figures.get(mode, 0.0):.0%}" for mode in modes)
        table.add_row(
            name, f"{figures['step']:g}", f"{right:.1%}", f"{tokens:.1f}", f"{turns:.1f}", *shares, f"{aes:+.2f}"
        )
    return table


def rounds_played(
    pool: Sequence[Sequence[Summary]], path: Sequence[tuple[int, int]], names: tuple[str, str], base: Summary
) -> Table:
    """One row for each round of a training run in which two policies were partners, AES against `base`."""
    table = Table(title="Round by round", title_justify="left")
    for heading in ("", "right", "95% interval", "tokens", "turns", "AES"):
        table.add_column(heading, justify="right" if heading else "left")
    for row, column in path:
        summary = pool[row][column]
        low, high = summary.interval
        table.add_row(
            escape(f"{names[0]}-r{row}⊗{names[1]}-r{column}"), f"{summary.accuracy:.1%}", f"{low:.1%} to {high:.1%}",
            f"{summary.tokens:.1f}", f"{summary.turns:.1f}", _aes(summary, base),
        )  # fmt: skip
    return table


def equal_tokens(controls: Mapping[str, Control], gains: Mapping[str, Estimate] | None = None) -> Table:
    """One row a control: what a lone agent gets right, and for how many tokens; and, if known, the team's gain."""
    table = Table(title="For the same tokens, alone", title_justify="left")
    for heading in ("", "right", "tokens", *(("team's gain", "95% interval") if gains else ())):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, control in controls.items():
        gain = gains.get(name) if gains else None
        told = (f"{gain.value:+.1%}", _between(gain, "+.1%")) if gain else ()
        table.add_row(escape(name), f"{control.accuracy:.1%}", f"{control.tokens:.1f}", *told)
    return table


def contributions(found: Sequence[Contribution], *, title: str = "") -> Table:
    """One row a seat: what was right as the team played and without the seat, what it is worth, and what it costs.

    Intervals of 95% are of the differences. "empty" is the share of the seat's turns without a word but tags.
    """
    table = Table(title=escape(title), title_justify="left")
    headings = ("right", "without", "worth", "95% interval", "tokens", "costs", "95% interval", "empty")
    for heading in ("", *headings):
        table.add_column(heading, justify="right" if heading else "left")
    for one in found:
        right, tokens = one.accuracy, one.tokens
        table.add_row(
            escape(one.seat), f"{right.team:.1%}", f"{right.without:.1%}", f"{right.gain:+.1%}",
            f"{right.low:+.0%} to {right.high:+.0%}", f"{tokens.team:.1f}", f"{tokens.gain:+.1f}",
            f"{tokens.low:+.0f} to {tokens.high:+.0f}", "" if one.empty is None else f"{one.empty:.0%}",
        )  # fmt: skip
    return table


def left_out(dropped: Sequence[Dropped], *, kept: int, title: str = "Chains left out") -> Table:
    """One row for each stage and each reason: how many chains it cost, and the id of the first."""
    table = Table(title=escape(title), title_justify="left", caption=f"{kept} kept", caption_justify="left")
    for heading in ("stage", "reason", "chains", "such as"):
        table.add_column(heading, justify="right" if heading == "chains" else "left")
    found: dict[tuple[str, str], list[str]] = {}
    for one in dropped:
        found.setdefault((one.stage, one.reason), []).append(one.id)
    for (stage, reason), ids in found.items():
        table.add_row(stage, escape(reason), str(len(ids)), escape(ids[0]))
    return table


def evaluations(runs: Mapping[str, Evaluation], *, title: str = "", caption: str = "") -> Table:
    """One row a run: avg@k, pass@k and tokens with their 95% intervals, tokens of each seat, turns, think share."""
    seats = sorted({seat for run in runs.values() for seat in run.seat_tokens})
    routed = any(run.think_share is not None for run in runs.values())
    ks = sorted({max(run.pass_at) for run in runs.values() if run.pass_at})
    table = Table(title=escape(title), title_justify="left", caption=escape(caption), caption_justify="left")
    table.add_column("")
    headings = [
        "samples",
        "right",
        "95% interval",
        *(f"pass@{k}" for k in ks),
        "tokens",
        "95% interval",
        "per right answer",
    ]
    headings += [*(map(escape, seats) if len(seats) > 1 else []), "turns", *(["thinks"] if routed else [])]
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, run in runs.items():
        cells = [f"{run.samples} × {run.problems}", f"{run.accuracy.value:.1%}", _between(run.accuracy, ".1%")]
        cells += [f"{run.pass_at[k].value:.1%}" if k in run.pass_at else "" for k in ks]
        cells += [f"{run.tokens.value:.1f}", _between(run.tokens, ".1f")]
        cells.append(f"{run.tokens_per_right.value:.1f}" if run.tokens_per_right else "")
        if len(seats) > 1:
            spoken = run.seat_tokens
            cells += [f"{spoken[seat]:.1f}" if seat in spoken else "" for seat in seats]
        cells.append(f"{run.turns:.1f}")
        if routed:
            cells.append("" if run.think_share is None else f"{run.think_share:.0%}")
        table.add_row(escape(name), *cells)
    return table


def endings(runs: Mapping[str, Evaluation]) -> Table:
    """One row a run: how many episodes ended in each outcome, and what share of the turns was cut off or ill-formed.

    Of several seats also what share of the turns of each was cut off.
    """
    seats = sorted({seat for run in runs.values() for seat in run.seat_cut_off})
    each = seats if len(seats) > 1 else []
    table = Table(title="How it ended: episodes, and turns", title_justify="left")
    table.add_column("")
    for heading in [
        *map(str, Outcome),
        "failed",
        "cut off",
        *(f"cut off, {escape(seat)}" for seat in each),
        "ill-formed",
    ]:
        table.add_column(heading, justify="right")
    for name, run in runs.items():
        counts = [str(run.outcomes.get(outcome, 0)) for outcome in Outcome]
        ill_formed = "" if run.ill_formed is None else f"{run.ill_formed:.1%}"
        cut_off = (f"{run.seat_cut_off[seat]:.1%}" if seat in run.seat_cut_off else "" for seat in each)
        table.add_row(escape(name), *counts, str(run.failed), f"{run.cut_off:.1%}", *cut_off, ill_formed)
    return table


def differences(found: Mapping[str, Difference]) -> Table:
    """One row a run: what it has more or less than its baseline, each with its 95% interval, and AES against it.

    It is over the problems that both have met.
    """
    baseline = next(iter(found.values())).baseline
    table = Table(title=f"Against {escape(baseline)}", title_justify="left")
    table.add_column("")
    for heading in ("right", "95% interval", "tokens", "95% interval", "AES", "95% interval", "problems"):
        table.add_column(heading, justify="right")
    for name, one in found.items():
        aes = ("", "") if one.aes is None else (f"{one.aes.value:+.2f}", _between(one.aes, "+.2f"))
        table.add_row(
            escape(name), f"{one.accuracy.value:+.1%}", _between(one.accuracy, "+.1%"), f"{one.tokens.value:+.1f}",
            _between(one.tokens, "+.1f"), *aes, str(one.problems),
        )  # fmt: skip
    return table


def printed_results(rows: Sequence[Printed], benchmark: str) -> Table:
    """What the papers print of a benchmark, one row a system.

    Long⊗Short prints the length over all of its five benchmarks only, and AES over these.
    """
    table = Table(title=f"The papers' own figures on {benchmark}", title_justify="left")
    for heading in ("paper", "system", "right", "tokens", "thinks", "length, all five", "AES, all five"):
        table.add_column(heading, justify="left" if heading in ("paper", "system") else "right")
    for row in rows:
        tokens, thinks = row.tokens.get(benchmark), row.thinks.get(benchmark)
        table.add_row(
            row.paper, row.system, f"{row.accuracy[benchmark]:.1%}", "" if tokens is None else f"{tokens:.0f}",
            "" if thinks is None else f"{thinks:.0%}", "" if row.length is None else f"{row.length:.0f}",
            "" if row.aes is None else f"{row.aes:+.2f}",
        )  # fmt: skip
    return table


def _between(estimate: Estimate, form: str) -> str:
    return f"{estimate.low:{form}} to {estimate.high:{form}}"


def _aes(summary: Summary, base: Summary) -> str:
    if base.accuracy == 0:
        return ""
    score = accuracy_efficiency_score(
        summary.accuracy, summary.tokens, base_accuracy=base.accuracy, base_tokens=base.tokens
    )
    return f"{score:+.2f}"
