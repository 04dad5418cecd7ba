"""Plots, drawn without a display: `savefig` writes them."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from turnwise.analysis.control import Budgets, Control
from turnwise.environments.episode import Episode
from turnwise.rl.summary import Summary, by_level, summarise


def heat_map(pool: Sequence[Sequence[Summary | Control]], names: tuple[str, str], *, title: str = "") -> Figure:
    """Accuracy and tokens of every round of one policy (rows) with every round of another (columns)."""
    figure = Figure(figsize=(9, 4.2), dpi=150, layout="constrained")
    if title:
        figure.suptitle(title)
    accuracy = [[summary.accuracy for summary in row] for row in pool]
    tokens = [[summary.tokens for summary in row] for row in pool]
    # A tenth of accuracy at the least spans the colours, so that noise does not look like a finding.
    lowest, longest = min(0.9, *map(min, accuracy)), max(map(max, tokens))
    panels = (
        (accuracy, lowest, 1.0, "{:.1%}", "right"),
        (tokens, 0.0, longest, "{:.0f}", "sampled tokens an episode"),
    )
    for axes, (values, low, high, form, heading) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto")
        axes.set(title=heading, xlabel=f"{names[1]} after round", ylabel=f"{names[0]} after round")
        axes.set_xticks(range(len(values[0])), [f"r{round}" for round in range(len(values[0]))])
        axes.set_yticks(range(len(values)), [f"r{round}" for round in range(len(values))])
        middle = (low + high) / 2
        for row, cells in enumerate(values):
            for column, value in enumerate(cells):
                colour = "black" if value > middle else "white"
                axes.text(column, row, form.format(value), ha="center", va="center", color=colour, fontsize=9)
    return figure


def accuracy_over_tokens(runs: Mapping[str, Sequence[Episode]], *, title: str = "") -> Figure:
    """Accuracy, with its 95% interval, over sampled tokens an episode: one point a run.

    Where the problems have levels, a thin line joins each run's levels, marked by their numbers.
    """
    figure = Figure(figsize=(7.5, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for index, (name, episodes) in enumerate(runs.items()):
        colour, summary = f"C{index}", summarise(episodes)
        low, high = summary.interval
        error = [[summary.accuracy - low], [high - summary.accuracy]]
        axes.errorbar(summary.tokens, summary.accuracy, yerr=error, fmt="o", ms=10, capsize=4, color=colour, label=name)
        levels = by_level(episodes)
        if len(levels) > 1:
            tokens, accuracies = [s.tokens for s in levels.values()], [s.accuracy for s in levels.values()]
            axes.plot(tokens, accuracies, color=colour, alpha=0.4, lw=1)
            for level, x, y in zip(levels, tokens, accuracies, strict=True):
                axes.annotate(str(level), (x, y), color=colour, fontsize=8, ha="center", va="center")
    axes.set(xlabel="sampled tokens an episode", ylabel="right", ylim=(0, 1.05), title=title)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def accuracy_over_budgets(budgets: Budgets, *, team: str, title: str = "") -> Figure:
    """What a lone agent gets right over the tokens it may spend, cut short and by voting, and the team as a point."""
    figure = Figure(figsize=(7.5, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        [point.tokens for point in budgets.cut_short], [point.accuracy for point in budgets.cut_short],
        color="C0", lw=1.5, label="alone, cut short",
    )  # fmt: skip
    tokens = [point.tokens for point in budgets.voting.values()]
    axes.plot(
        tokens,
        [point.accuracy for point in budgets.voting.values()],
        color="C2",
        marker="o",
        ms=4,
        label="alone, voting",
    )
    for votes, point in budgets.voting.items():
        place = (point.tokens, point.accuracy)
        axes.annotate(
            str(votes), place, xytext=(0, -11), textcoords="offset points", fontsize=8, ha="center", color="C2"
        )
    low, high = budgets.interval
    # Wilson's interval of a share of 1 ends there, up to rounding.
    error = [[max(0.0, budgets.team.accuracy - low)], [max(0.0, high - budgets.team.accuracy)]]
    axes.errorbar(
        budgets.team.tokens, budgets.team.accuracy, yerr=error, fmt="o", ms=9, capsize=4, color="C1", label=team
    )
    axes.set(xlabel="sampled tokens a problem", ylabel="right", ylim=(0, 1.05), title=title)
    # One vote of many may cost many times what the team takes.
    axes.set_xscale("symlog", linthresh=max(10.0, budgets.voting[1].tokens))
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure
