"""Summaries side by side, for the terminal."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from turnwise.analysis.summary import Summary, accuracy_efficiency_score, by_level, summarise
from turnwise.environments.episode import Episode


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


def _aes(summary: Summary, base: Summary) -> str:
    if base.accuracy == 0:
        return ""
    score = accuracy_efficiency_score(
        summary.accuracy, summary.tokens, base_accuracy=base.accuracy, base_tokens=base.tokens
    )
    return f"{score:+.2f}"
