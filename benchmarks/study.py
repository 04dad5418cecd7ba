"""What the two studies share: many training runs, a few at a time, each done once and resumed where it was stopped."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

import orjson
from rich.console import Console

from turnwise.rl.metrics import read_metrics

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"


def run_all(script: str, runs: Mapping[str, Sequence[str]], folder: Path, workers: int) -> None:
    """Runs an example once for each of `runs`, with its flags, into a folder of the run's name."""
    console = Console()

    def run(name: str) -> None:
        output = folder / name
        if (output / "results.json").exists():
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        console.print(f"{name}: {command(script, runs[name])}", highlight=False)
        with (folder / f"{name}.log").open("w") as log:
            subprocess.run(
                [sys.executable, ROOT / "examples" / script, *runs[name], "--output", output],
                cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, check=True,
            )  # fmt: skip

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, runs))


def command(script: str, flags: Sequence[str]) -> str:
    """The command line of a run, to be copied."""
    return shlex.join(["python", f"examples/{script}", *flags])


def series(folder: Path, figure: str) -> tuple[list[int], list[float]]:
    """A figure of a run over its steps."""
    found = [(int(line["step"]), line[figure]) for line in read_metrics(folder) if figure in line]
    return [step for step, _ in found], [value for _, value in found]


def results(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """What a run's last evaluation came to."""
    found: dict[str, dict[str, dict[str, float]]] = orjson.loads((folder / "results.json").read_bytes())
    return found


def smoothed(values: Sequence[float], width: int = 5) -> list[float]:
    """The mean of each value and of those before it, `width` at most."""
    return [fmean(values[max(0, place - width + 1) : place + 1]) for place in range(len(values))]


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and the range where there is one."""
    mean, low, high = (form.format(value) for value in (fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def write_json(name: str, found: object) -> None:
    """Writes a small JSON file into docs/results, numbers rounded to what they are good for."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / name).write_bytes(orjson.dumps(_rounded(found), option=orjson.OPT_INDENT_2) + b"\n")


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {str(key): _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list | tuple) else value
