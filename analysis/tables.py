"""Summaries side by side, for the terminal."""

from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from turnwise.analysis.contribution import Contribution
from turnwise.analysis.control import Control
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
    table = Table(title=title, title_justify="left")
    table.add_column("")
    headings = ["right", "95% interval", "tokens", *(seats if len(seats) > 1 else []), "turns"]
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
        table.add_row(name, *cells, _aes(summary, summaries[baseline]))
    return table


def levels(runs: Mapping[str, Sequence[Episode]], *, title: str = "") -> Table:
    """One row a level: accuracy and tokens of each run."""
    tables = {name: by_level(episodes) for name, episodes in runs.items()}
    table = Table(title=title, title_justify="left")
    table.add_column("level", justify="right")
    for name in tables:
        table.add_column(name, justify="right")
    for level in sorted({level for summaries in tables.values() for level in summaries}):
        cells = (summaries.get(level) for summaries in tables.values())
        table.add_row(str(level), *(f"{s.accuracy:.0%} in {s.tokens:.0f}" if s else "" for s in cells))
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
            f"{names[0]}-r{row}⊗{names[1]}-r{column}", f"{summary.accuracy:.1%}", f"{low:.1%} to {high:.1%}",
            f"{summary.tokens:.1f}", f"{summary.turns:.1f}", _aes(summary, base),
        )  # fmt: skip
    return table


def equal_tokens(controls: Mapping[str, Control]) -> Table:
    """One row a control: what a lone agent gets right, and for how many tokens."""
    table = Table(title="For the same tokens, alone", title_justify="left")
    for heading in ("", "right", "tokens"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, control in controls.items():
        table.add_row(name, f"{control.accuracy:.1%}", f"{control.tokens:.1f}")
    return table


def contributions(found: Sequence[Contribution], *, title: str = "") -> Table:
    """One row a seat: what was right as the team played and without the seat, what it is worth, and what it costs.

    Intervals of 95% are of the differences. "empty" is the share of the seat's turns without a word but tags.
    """
    table = Table(title=title, title_justify="left")
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
    table = Table(title=title, title_justify="left", caption=f"{kept} kept", caption_justify="left")
    for heading in ("stage", "reason", "chains", "such as"):
        table.add_column(heading, justify="right" if heading == "chains" else "left")
    found: dict[tuple[str, str], list[str]] = {}
    for one in dropped:
        found.setdefault((one.stage, one.reason), []).append(one.id)
    for (stage, reason), ids in found.items():
        table.add_row(stage, escape(reason), str(len(ids)), escape(ids[0]))
    return table


def _aes(summary: Summary, base: Summary) -> str:
    if base.accuracy == 0:
        return ""
    score = accuracy_efficiency_score(
        summary.accuracy, summary.tokens, base_accuracy=base.accuracy, base_tokens=base.tokens
    )
    return f"{score:+.2f}"
