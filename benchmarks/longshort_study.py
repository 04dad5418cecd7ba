"""Long⊗Short on a laptop: 3 seeds, what alternating, brevity, the baseline and the length reward do, and a lone model.

    python benchmarks/longshort_study.py

Some ten minutes a run on one core, `--workers` at a time; a stopped study goes on where it was. Writes
docs/results/longshort.json and .png, and longshort_pool.png.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated

import orjson
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from study import RESULTS, command, results, run_all, series, smoothed, spread, write_json

from turnwise.analysis.control import Control
from turnwise.analysis.plots import heat_map
from turnwise.rl.summary import accuracy_efficiency_score

SEEDS = (0, 1, 2)
VARIANTS: dict[str, Sequence[str]] = {
    "alternating": (),
    "simultaneous": ("--training.rounds", "long+short long+short long+short"),
    "no brevity": ("--brevity", "[[0,0.0]]"),
    "pooled baseline": ("--training.grouping", "pooled"),
    "arora-zanette": ("--length", "arora-zanette"),
}
ALONE = "long alone, trained"


def main(
    runs: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs/longshort_study"),
    workers: Annotated[int, typer.Option(help="How many runs at a time, a core each.")] = 2,
) -> None:
    """Runs what has not been run yet, then draws and prints what came of it."""
    jobs = {name(variant, seed): flags(variant, seed) for variant in VARIANTS for seed in seeds(variant)}
    run_all("train_longshort.py", jobs, runs, workers)
    run_all("train_alone.py", {name(ALONE, seed): flags(ALONE, seed) for seed in seeds(ALONE)}, runs, workers)
    found = {
        variant: [outcome(runs / name(variant, seed)) for seed in seeds(variant)] for variant in (*VARIANTS, ALONE)
    }
    Console().print(table(found))
    commands = {variant: command(script(variant), flags(variant, 0)) for variant in (*VARIANTS, ALONE)}
    rounds = [rounds_of(runs / name("alternating", seed)) for seed in SEEDS]
    Console().print(rounds_table(rounds))
    made_by = "python benchmarks/longshort_study.py"
    write_json("longshort.json", {"made by": made_by, "seed 0 by": commands, "runs": found, "rounds": rounds})
    draw(runs, found).savefig(RESULTS / "longshort.png")
    pool(runs).savefig(RESULTS / "longshort_pool.png")


def seeds(variant: str) -> tuple[int, ...]:
    """Three for the two ways to take turns at learning, one for each ablation."""
    return SEEDS if variant in ("alternating", "simultaneous") else SEEDS[:1]


def name(variant: str, seed: int) -> str:
    """The folder of a run."""
    return f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}"


def script(variant: str) -> str:
    """The example that runs it."""
    return "train_alone.py" if variant == ALONE else "train_longshort.py"


def flags(variant: str, seed: int) -> list[str]:
    """Its flags."""
    return [*VARIANTS.get(variant, ()), "--training.seed", str(seed)]


def outcome(folder: Path) -> dict[str, float]:
    """What a run came to against the long model alone, untrained."""
    found = results(folder)
    trained, base = found["runs"]["trained"], found["runs"].get("long alone", found["runs"]["before"])
    scored = accuracy_efficiency_score(
        trained["accuracy"], trained["tokens"], base_accuracy=base["accuracy"], base_tokens=base["tokens"]
    )
    saved = 1 - trained["tokens"] / base["tokens"]
    figures = {"right": trained["accuracy"], "tokens": trained["tokens"], "saved": saved, "aes": scored}
    base_figures = {"base right": base["accuracy"], "base tokens": base["tokens"]}
    controls = {control: value["accuracy"] for control, value in found["controls"].items()}
    return {**figures, **base_figures, **controls}


def table(found: dict[str, list[dict[str, float]]]) -> Table:
    """One row a variant: mean over the seeds, with the least and the most."""
    shown = Table(title=f"400 held-out problems of arithmetic-mixed, {len(SEEDS)} seeds: mean (least to most)")
    for heading in ("", "right", "tokens", "fewer than long alone", "AES"):
        shown.add_column(heading, justify="right" if heading else "left")
    forms = {"right": "{:.1%}", "tokens": "{:.1f}", "saved": "{:.1%}", "aes": "{:+.2f}"}
    for variant, outcomes in found.items():
        shown.add_row(variant, *(spread([one[figure] for one in outcomes], form) for figure, form in forms.items()))
    first = found["alternating"][0]
    for control in (name for name in first if "cut short" in name or "majority" in name):
        right = spread([one[control] for one in found["alternating"]], forms["right"])
        shown.add_row(f"same tokens: {control}", right)
    return shown


def rounds_of(folder: Path) -> list[dict[str, float | str]]:
    """Round by round: which weights were partners, what was right, in how many tokens."""
    found, base = orjson.loads((folder / "pool.json").read_bytes()), results(folder)["runs"]["long alone"]
    rows = []
    for row, column in found["path"]:
        cell = found["pool"][row][column]
        scored = accuracy_efficiency_score(
            cell["accuracy"], cell["tokens"], base_accuracy=base["accuracy"], base_tokens=base["tokens"]
        )
        rows.append({"round": f"r{row}⊗r{column}", "right": cell["accuracy"], "tokens": cell["tokens"], "aes": scored})
    return rows


def rounds_table(rounds: list[list[dict[str, float | str]]]) -> Table:
    """The rounds, each seed's figures beside each other."""
    shown = Table(title="Alternating rounds, by seed")
    for heading in ("", "right", "tokens", "AES"):
        shown.add_column(heading, justify="right" if heading else "left")
    for seeds in zip(*rounds, strict=True):
        cells = [
            " ".join(form.format(one[figure]) for one in seeds)
            for figure, form in {"right": "{:.1%}", "tokens": "{:.1f}", "aes": "{:+.2f}"}.items()
        ]
        shown.add_row(str(seeds[0]["round"]), *cells)
    return shown


def draw(runs: Path, found: dict[str, list[dict[str, float]]]) -> Figure:
    """Tokens and right answers over the policy updates of a run, and where each variant ended."""
    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    over, ended = figure.subplots(1, 2)
    for index, variant in enumerate(VARIANTS):
        for seed in seeds(variant):
            steps, tokens = series(runs / name(variant, seed), "tokens")
            over.plot(steps, smoothed(tokens), color=f"C{index}", lw=1.2, label=variant if seed == 0 else None)
    over.set(xlabel="training step (mean of 5)", ylabel="sampled tokens an episode", title="in training, each seed")
    over.set_ylim(bottom=0)
    for index, (variant, outcomes) in enumerate(found.items()):
        points = [(one["tokens"], one["right"]) for one in outcomes]
        ended.plot(*zip(*points, strict=True), "o", ms=8, alpha=0.8, color=f"C{index}", label=variant)
    base = found["alternating"][0]
    ended.plot(base["base tokens"], base["base right"], "k*", ms=12, label="long alone")
    ended.set(xlabel="sampled tokens an episode", ylabel="right", title="held-out problems, each seed")
    ended.set(xlim=(0, None), ylim=(0.94, 1.003))
    ended.yaxis.set_major_formatter("{x:.0%}")
    for axes in (over, ended):
        axes.grid(alpha=0.3)
    ended.legend(fontsize=8)
    return figure


def pool(runs: Path) -> Figure:
    """The heat map of rounds, mean over the seeds of the alternating runs."""
    pools = [orjson.loads((runs / name("alternating", seed) / "pool.json").read_bytes())["pool"] for seed in SEEDS]
    mean = [
        [
            Control(fmean(cell["accuracy"] for cell in cells), fmean(cell["tokens"] for cell in cells))
            for cells in zip(*rows, strict=True)
        ]
        for rows in zip(*pools, strict=True)
    ]
    return heat_map(
        mean, ("long", "short"), title=f"Rounds of one with rounds of the other, mean of {len(SEEDS)} seeds"
    )


if __name__ == "__main__":
    typer.run(main)
