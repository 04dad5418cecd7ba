"""Thinkless on a laptop: DeGRPO beside GRPO and other α, 3 seeds, and where GRPO collapses to one mode.

    python benchmarks/thinkless_study.py

Some eight minutes a run on one core, `--workers` at a time; a stopped study goes on where it was. Writes into
docs/results: thinkless.json and .png, thinkless_control.png, thinkless_collapse.png.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from study import RESULTS, command, results, run_all, series, smoothed, spread, write_json

SCRIPT = "train_thinkless.py"
SEEDS = (0, 1, 2)
VARIANTS: dict[str, Sequence[str]] = {
    "DeGRPO, α = 0.1": (),
    "GRPO": ("--learner.loss.aggregation", "sample-mean"),
    "DeGRPO, α = 0.5": ("--learner.loss.alpha", "0.5"),
    "DeGRPO, α = 0.001": ("--learner.loss.alpha", "0.001"),
    "DeGRPO, γ = 0.5": ("--gamma", "0.5"),
    "DeGRPO, not divided by the deviation": ("--training.estimator", "mean-centred"),
}
SETS = {"easy": (1, 2), "mixed": (1, 2, 3, 4, 5, 6), "hard": (5, 6)}
RATES, GAMMAS = ("2e-4", "1e-3"), ("0.2", "0.5")
SHORT, THINK = "<short>", "<think>"


def main(
    runs: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs/thinkless_study"),
    workers: Annotated[int, typer.Option(help="How many runs at a time, a core each.")] = 2,
) -> None:
    """Runs what has not been run yet, then draws and prints what came of it."""
    jobs = {name(variant, seed): flags(variant, seed) for variant in VARIANTS for seed in seeds(variant)}
    run_all(SCRIPT, jobs | {cell(*place): cell_flags(*place) for place in cells()}, runs, workers)
    found = {variant: [outcome(runs / name(variant, seed)) for seed in seeds(variant)] for variant in VARIANTS}
    collapse = [collapsed(runs, *place) for place in cells()]
    console = Console()
    console.print(table(found))
    console.print(by_set(found[next(iter(VARIANTS))]))
    commands = {variant: command(SCRIPT, flags(variant, 0)) for variant in VARIANTS}
    commands["a cell of the map"] = command(SCRIPT, cell_flags(*next(iter(cells()))))
    made_by = "python benchmarks/thinkless_study.py"
    write_json("thinkless.json", {"made by": made_by, "by": commands, "runs": found, "collapse of GRPO": collapse})
    draw(runs, found).savefig(RESULTS / "thinkless.png")
    draw_control(runs).savefig(RESULTS / "thinkless_control.png")
    draw_collapse(collapse).savefig(RESULTS / "thinkless_collapse.png")


def seeds(variant: str) -> tuple[int, ...]:
    """Three for DeGRPO and GRPO, one for the others."""
    return SEEDS if variant in list(VARIANTS)[:2] else SEEDS[:1]


def name(variant: str, seed: int) -> str:
    """The folder of a run."""
    return f"variant-{list(VARIANTS).index(variant)}-{seed}"


def flags(variant: str, seed: int) -> list[str]:
    """Its flags."""
    return [*VARIANTS[variant], "--training.seed", str(seed)]


def cells() -> list[tuple[str, str, str]]:
    """The places of the map: problem set (the ratio of lengths), learning rate, γ."""
    return [(problems, rate, gamma) for problems in SETS for rate in RATES for gamma in GAMMAS]


def cell(problems: str, rate: str, gamma: str) -> str:
    """The folder of the run at a place of the map."""
    return f"collapse-{problems}-{rate}-{gamma}"


def cell_flags(problems: str, rate: str, gamma: str) -> list[str]:
    """Its flags."""
    return [
        *VARIANTS["GRPO"], "--train", problems, "--test", problems, "--learner.learning-rate", rate, "--gamma", gamma,
        "--training.steps", "60", "--test-problems", "120",
    ]  # fmt: skip


def outcome(folder: Path) -> dict[str, object]:
    """What a run came to, and what it is held against."""
    found = results(folder)
    kept = ("accuracy", "tokens", "think_share")
    runs = {
        title: {
            **{figure: run[figure] for figure in kept if run[figure] is not None},
            "by level": {
                level: {figure: value[figure] for figure in kept if value[figure] is not None}
                for level, value in run["levels"].items()
            },
        }
        for title, run in found["runs"].items()
    }
    steps, shares = series(folder, f"share of modes/{THINK}")
    return {
        **runs,
        "for the same tokens": found["controls"],
        "think share by step, mean of 5": dict(zip(steps[4::5], smoothed(shares)[4::5], strict=True)),
    }


def collapsed(runs: Path, problems: str, rate: str, gamma: str) -> dict[str, object]:
    """Where GRPO ended at a place of the map."""
    folder = runs / cell(problems, rate, gamma)
    found = results(folder)["runs"]
    ratio = found["always think"]["tokens"] / found["never think"]["tokens"]
    _, shares = series(folder, f"share of modes/{THINK}")
    return {
        "problems": problems, "think to short length": ratio, "learning rate": float(rate), "gamma": float(gamma),
        "think share": fmean(shares[-5:]), "right": found["trained"]["accuracy"],
        "right, always think": found["always think"]["accuracy"],
        "right, never think": found["never think"]["accuracy"],
    }  # fmt: skip


def table(found: dict[str, list]) -> Table:
    """One row a variant, and always thinking: mean over the seeds, with the least and the most."""
    shown = Table(title="400 held-out problems of arithmetic-mixed: mean (least to most) over the seeds")
    levels = [str(level) for level in SETS["mixed"]]
    for heading in ("", "seeds", "thinks", "right", "tokens", "thinks by level"):
        shown.add_column(heading, justify="right" if heading else "left")
    always = [run["always think"] for runs in found.values() for run in runs]
    shown.add_row(
        "always think",
        "",
        "100%",
        spread([run["accuracy"] for run in always], "{:.1%}"),
        spread([run["tokens"] for run in always], "{:.0f}"),
    )
    for variant, runs in found.items():
        trained = [run["trained"] for run in runs]
        by_level = [fmean(run["by level"][level]["think_share"] for run in trained) for level in levels]
        shown.add_row(
            variant, str(len(runs)), spread([run["think_share"] for run in trained], "{:.0%}"),
            spread([run["accuracy"] for run in trained], "{:.1%}"),
            spread([run["tokens"] for run in trained], "{:.0f}"),
            " ".join(f"{share:.0%}" for share in by_level),
        )  # fmt: skip
    for control, value in always_for_same(found).items():
        shown.add_row(
            control,
            "",
            "",
            spread([one["accuracy"] for one in value], "{:.1%}"),
            spread([one["tokens"] for one in value], "{:.0f}"),
        )
    return shown


def always_for_same(found: dict[str, list]) -> dict[str, list[dict[str, float]]]:
    """The lone controls at the tokens of the first variant's runs, by their names without the number of votes."""
    controls: dict[str, list[dict[str, float]]] = {}
    for run in next(iter(found.values())):
        for control, value in run["for the same tokens"].items():
            controls.setdefault(control.partition(" of ")[0], []).append(value)
    return controls


def by_set(runs: list) -> Table:
    """Before and after, on what is easy, mixed and hard, as the paper's table goes from GSM8K to AIME."""
    shown = Table(title="DeGRPO, by problem set: right, tokens (share that thinks)")
    for heading in ("", *SETS):
        shown.add_column(heading, justify="right" if heading else "left")
    for title in ("always think", "never think", "before", "trained"):
        cells = []
        for levels in SETS.values():
            chosen = [run[title]["by level"][str(level)] for run in runs for level in levels]
            right, tokens = fmean(one["accuracy"] for one in chosen), fmean(one["tokens"] for one in chosen)
            thinks = [one["think_share"] for one in chosen if "think_share" in one]
            cells.append(f"{right:.1%}, {tokens:.0f}" + (f" ({fmean(thinks):.0%})" if thinks else ""))
        shown.add_row(title, *cells)
    return shown


def draw(runs: Path, found: dict[str, list]) -> Figure:
    """The share that thinks: over the steps, and by level at the end."""
    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    over, by_level = figure.subplots(1, 2, sharey=True)
    for index, variant in enumerate(VARIANTS):
        for seed in seeds(variant):
            steps, shares = series(runs / name(variant, seed), f"share of modes/{THINK}")
            over.plot(
                steps, smoothed(shares), color=f"C{index}", alpha=0.8, lw=1.2, label=variant if seed == 0 else None
            )
        levels = SETS["mixed"]
        ends = [
            fmean(run["trained"]["by level"][str(level)]["think_share"] for run in found[variant]) for level in levels
        ]
        by_level.plot(levels, ends, "o-", color=f"C{index}", label=variant)
    over.set(
        xlabel="training step (mean of 5)",
        ylabel="share that thinks",
        ylim=(-0.03, 1.03),
        title="over training, each seed",
    )
    by_level.set(xlabel="level: steps of arithmetic", title="trained, held-out problems, mean over seeds")
    over.yaxis.set_major_formatter("{x:.0%}")
    for axes in (over, by_level):
        axes.grid(alpha=0.3)
    by_level.legend(fontsize=8)
    return figure


def draw_control(runs: Path) -> Figure:
    """The mean weight of a control token in the loss, by mode, over training (arXiv 2505.13379, eq. 3 and 4)."""
    figure = Figure(figsize=(7.5, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for index, variant in enumerate(list(VARIANTS)[:2]):
        for mode, style in ((SHORT, "--"), (THINK, "-")):
            steps, weights = series(runs / name(variant, 0), f"solver/control/weight/{mode}")
            axes.plot(steps, weights, style, color=f"C{index}", label=f"{variant}: {mode}")
    axes.set(yscale="log", xlabel="training step", ylabel="weight of the control token in its episode")
    axes.set_title("GRPO weighs the choice by the length of what follows; DeGRPO does not")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_collapse(collapse: list[dict]) -> Figure:
    """Where GRPO ends: share that thinks, and what that costs against the better of the two modes."""
    figure = Figure(figsize=(9, 4.2), dpi=150, layout="constrained")
    columns = [(rate, gamma) for rate in RATES for gamma in GAMMAS]
    panels = (("think share", "share that thinks at the end"), ("right", "right"))
    for axes, (value, title) in zip(figure.subplots(1, 2), panels, strict=True):
        rows = [[one[value] for one in collapse if one["problems"] == problems] for problems in SETS]
        axes.imshow(rows, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(columns)), [f"lr {rate}\nγ {gamma}" for rate, gamma in columns])
        ratios = [
            next(one["think to short length"] for one in collapse if one["problems"] == problems) for problems in SETS
        ]
        axes.set_yticks(
            range(len(SETS)), [f"{problems}\n{ratio:.0f} : 1" for problems, ratio in zip(SETS, ratios, strict=True)]
        )
        axes.set_title(title)
        for row, cells_ in enumerate(rows):
            for column, share in enumerate(cells_):
                axes.text(
                    column, row, f"{share:.0%}", ha="center", va="center", color="white" if share < 0.6 else "black"
                )
    figure.suptitle("GRPO after 60 steps, by problem set (think to short length), learning rate and γ")
    return figure


if __name__ == "__main__":
    typer.run(main)
