"""What commands and examples show: problems by name, progress to watch, and results to look at."""

import asyncio
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from turnwise.agents.agent import Agent
from turnwise.analysis.contribution import Contribution, branch, contribution
from turnwise.analysis.control import Control
from turnwise.analysis.tables import comparison, equal_tokens, evaluations_logged, levels, rounds_played
from turnwise.environments.answers import last_boxed, last_marked
from turnwise.environments.arithmetic import PROBLEM_SETS, Split, arithmetic
from turnwise.environments.environment import Environment, Grader
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.math_grader import MathGrader
from turnwise.environments.problem import Problem
from turnwise.protocols.graph import GraphProtocol
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.rl.episode_store import EpisodeStore
from turnwise.rl.rollout import Team, in_order, rollout
from turnwise.rl.run_folder import Run, write_whole
from turnwise.rl.summary import Summary, record

if TYPE_CHECKING:
    from turnwise.analysis.report import Written
    from turnwise.environments.benchmarks import LoadedProblems
    from turnwise.rl.cold_start.thoughts import WeighedChain
    from turnwise.rl.openrlhf.settings import OpenRLHFSettings
    from turnwise.rl.sft import SFTSettings
    from turnwise.rl.trainer import Trainer

ARITHMETIC = 96  # problems, where no number is given
SEAT_STYLES = ("cyan", "yellow", "green", "magenta", "blue")


def open_grader(answer_marker: str | None = None) -> MathGrader:
    """Grades what is in the last box, or what stands behind the last `answer_marker`."""
    return MathGrader(extract=last_boxed if answer_marker is None else partial(last_marked, marker=answer_marker))


def open_environment(
    problems: str, grader: Grader, *, number: int | None, seed: int, split: Split = "test"
) -> Environment:
    """An arithmetic problem set, a benchmark by its name, or a local JSONL, JSON or Parquet file.

    `BENCHMARK=FILE` is a local copy of a benchmark, with its columns. `split` is which part of an arithmetic set; a
    benchmark or a file is whatever it is. Without a number, all problems, and of arithmetic `ARITHMETIC` of them.

    Raises InputError for anything else, for a file that cannot be read, and for a number below 1.
    """
    if number is not None and number < 1:
        raise InputError(f"the number of problems must be at least 1; got {number}")
    if problems in PROBLEM_SETS:
        return arithmetic(grader, problem_set=problems, count=number or ARITHMETIC, split=split, seed=seed)
    from turnwise.environments.benchmarks import BENCHMARKS, load_benchmark  # datasets: only if needed

    name, copied, source = problems.partition("=")
    if name in BENCHMARKS:
        loaded = load_benchmark(BENCHMARKS[name], source=source if copied else None, limit=number)
        return Environment(name, _told(name, loaded), grader)
    if Path(problems).suffix:
        return Environment(problems, read_problems(problems, number=number), grader)
    named = ", ".join([*PROBLEM_SETS, *BENCHMARKS])
    raise InputError(f"no problems are called {problems!r}; name one of {named}, or a JSONL, JSON or Parquet file")


def read_problems(path: str | Path, *, number: int | None, solution: str | None = None) -> tuple[Problem, ...]:
    """The first problems of a JSONL, JSON or Parquet file, and of the column `solution` what answers them.

    Says on stderr which were dropped. Raises InputError for a file that cannot be read.
    """
    from turnwise.environments.benchmarks import Columns, load_problems  # datasets: only if needed

    return _told(str(path), load_problems(path, columns=Columns(solution=solution), limit=number))


def _told(name: str, loaded: "LoadedProblems") -> tuple[Problem, ...]:
    if loaded.dropped:
        Console(stderr=True).print(f"{name}: {loaded}", markup=False)
    return loaded.problems


def write_png(path: Path, write: Callable[[Path], object]) -> None:
    """As `write_whole`. Raises InputError for another kind of file, too."""
    if path.suffix != ".png":
        raise InputError(f"a figure is written as PNG; got {path}: name a file that ends in .png")
    write_whole(path, write)


def play_shown(
    title: str,
    protocol: ReasoningProtocol,
    team: Team,
    environment: Environment,
    console: Console,
    *,
    seed: int = 0,
    shown: int = 0,
    samples: int = 1,
    output: Path | None = None,
    settings: Mapping[str, str | int | float] | None = None,
    only: Collection[str] | None = None,
) -> list[Episode]:
    """Plays every problem `samples` times under a progress bar; prints the first `shown` conversations as they end.

    With an `output` folder the episodes are kept in a subfolder named after `title`; what is there already is not
    played again. `settings` is what, besides protocol, problems and seed, must be equal for that. `only` has the ids of
    the episodes to be played, if not all are.
    """
    described = {"protocol": protocol.fingerprint, "problems": environment.name, "seed": seed, **(settings or {})}
    columns = (
        TextColumn("{task.description:<12}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with (
        EpisodeStore(output / title.replace(" ", "-"), described) if output else nullcontext() as store,
        Progress(*columns, console=console) as progress,
    ):
        episodes = in_order(environment, (episode for episode in store or () if episode.error is None))
        already = len(episodes)
        most = len(environment.problems) * samples if only is None else len(only)
        task = progress.add_task(title, total=most, completed=already)

        async def watch() -> None:
            stream = rollout(protocol, team, environment, samples=samples, seed=seed, store=store, only=only)
            async for episode in stream:
                if len(episodes) - already < shown:
                    console.print(conversation(episode))
                episodes.append(episode)
                progress.advance(task)

        asyncio.run(watch())
    return in_order(environment, episodes)


def play_side_by_side(
    protocols: Mapping[str, GraphProtocol],
    team: Team,
    environment: Environment,
    *,
    baseline: str,
    seed: int = 0,
    shown: int = 3,
    output: Path | None = None,
    settings: dict[str, str | int | float] | None = None,
    plot: Path | None = None,
) -> None:
    """Plays several protocols on the same problems, as `play_shown` does, and prints what each of them came to.

    `shown` conversations are of the first protocol. AES is against the one named by `baseline`. `plot` is a PNG of
    accuracy over tokens.
    """
    console, runs = Console(), dict[str, list[Episode]]()
    for title, protocol in protocols.items():
        runs[title] = play_shown(
            title, protocol, team, environment, console,
            seed=seed, shown=0 if runs else shown, output=output, settings=settings,
        )  # fmt: skip
    show_results(runs, environment, console, baseline=baseline, plot=plot)


def show_results(
    runs: Mapping[str, Sequence[Episode]],
    environment: Environment,
    console: Console,
    *,
    baseline: str,
    controls: Mapping[str, Control] | None = None,
    plot: Path | None = None,
    results: Path | None = None,
) -> None:
    """Prints what each run came to, over all and by level, and the `controls`: what a lone agent gets for such tokens.

    AES is against the run named by `baseline`. `plot` is a PNG of accuracy over tokens, `results` a JSON file.
    """
    title = f"{len(environment.problems)} problems of {environment.name}"
    console.print(comparison(runs, baseline=baseline, title=title))
    if len({problem.level for problem in environment.problems}) > 1:
        console.print(levels(runs, title="Right, in how many tokens, by level"))
    if controls:
        console.print(equal_tokens(controls))
    if results:
        found = {name: record(episodes) for name, episodes in runs.items()}
        held_against = {name: asdict(control) for name, control in (controls or {}).items()}
        text = orjson.dumps({"runs": found, "controls": held_against}, option=orjson.OPT_INDENT_2)
        write_whole(results, lambda path: path.write_bytes(text))
    if plot:
        from turnwise.analysis.plots import accuracy_over_tokens  # matplotlib: only where it is asked for

        figure = accuracy_over_tokens(runs, title=title)
        write_png(plot, lambda draft: figure.savefig(draft, format="png"))


def contribution_shown(
    protocol: ReasoningProtocol,
    team: Team,
    grader: Grader,
    episodes: Sequence[Episode],
    seat: str,
    instead: tuple[str, Agent],
    console: Console,
    *,
    folder: Path,
    run: Run,
    settings: Run,
) -> Contribution:
    """What a seat of a run is worth against `instead`, a name and an agent, under a progress bar.

    The episodes that are played for it are kept in a subfolder; `run` is what they branch from, and `settings` who
    fills the other seats, and how. Raises InputError where the subfolder holds what was played otherwise.
    """
    name, agent = instead
    described = {"protocol": protocol.fingerprint, **settings, "seat": seat, "instead": name}
    described |= {f"of {key}": value for key, value in run.items()}
    title = re.sub(r"[^\w.-]+", "-", f"{seat} {name}")
    with EpisodeStore(folder / title, described) as store, stages_shown(console) as on_progress:
        total = sum(episode.grade is not None for episode in episodes)

        async def watch() -> None:
            on_progress(title, len(store.ids), total)
            async for _ in branch(protocol, team, grader, episodes, seat, agent, store=store):
                on_progress(title, len(store.ids), total)

        asyncio.run(watch())
        return contribution(protocol, seat, name, episodes, list(store))


def show_pool(
    pool: Sequence[Sequence[Summary]],
    path: Sequence[tuple[int, int]],
    names: tuple[str, str],
    base: Summary,
    console: Console,
    *,
    folder: Path,
) -> None:
    """Prints what two policies came to round by round; writes all their rounds together to `pool.json` and `.png`."""
    from turnwise.analysis.plots import heat_map  # matplotlib: only where it is asked for

    console.print(rounds_played(pool, path, names, base))
    rows = [[{"accuracy": cell.accuracy, "tokens": cell.tokens, "turns": cell.turns} for cell in row] for row in pool]
    found = {"rows": names[0], "columns": names[1], "path": path, "pool": rows}
    (folder / "pool.json").write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2))
    heat_map(pool, names).savefig(folder / "pool.png")


def train_shown(trainer: "Trainer", console: Console) -> None:
    """Trains to the end under one live line: the step, who learns, and what the last episodes came to.

    Evaluations are printed as they come, and so is the first step of a mode's collapse.
    """
    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    alarmed = None
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=trainer.steps)
        for report in trainer.train():
            if report.evaluation is not None:
                console.print(f"step {report.step:>4}  {_in_words(report.evaluation)}", highlight=False)
            if report.collapsed != alarmed and (alarmed := report.collapsed):
                warning = f"step {report.step:>4}  only {alarmed} is chosen: the other modes are no longer tried"
                console.print(Text(warning, style="red"))
            if report.round is not None:
                who = f"round {report.round.number}, {'+'.join(report.round.trains)}"
                came_to = f"{report.figures['right']:.0%} right in {report.figures['tokens']:.0f} tokens"
                shares = (f" {mode} {share:.0%}" for mode, share in report.modes.items())
                progress.update(task, description=f"{who}: {came_to}{''.join(shares)}")
            progress.update(task, completed=report.step)


def show_trained(trainer: "Trainer", console: Console) -> None:
    """Prints what the policies came to, of the evaluations that a run has logged, and where they are."""
    from turnwise.rl.metrics import read_metrics  # torch: only where it is needed

    evaluated = [figures for figures in read_metrics(trainer.folder) if "evaluation/right" in figures]
    best = max(evaluated, key=lambda figures: figures["evaluation/aes"])
    console.print(evaluations_logged({"before": evaluated[0], "best": best, "after": evaluated[-1]}))
    console.print(f"The policies of the best evaluation are in {trainer.folder / 'best'}, of each round in ", end="")
    console.print(f"{trainer.folder / 'policies'}; all figures in {trainer.folder / 'metrics.jsonl'}.")


@contextmanager
def stages_shown(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each stage of a long work, by what it yields: a function of (stage, done, at the most)."""
    columns = (
        TextColumn("{task.description:<12}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks = dict[str, TaskID]()

        def on_progress(stage: str, done: int, most: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=most)
            progress.update(tasks[stage], completed=done, total=most)

        yield on_progress


def fine_tune_shown(
    model: str,
    data: Path,
    settings: "SFTSettings",
    folder: Path,
    console: Console,
    *,
    seed: int = 0,
    together: int = 1,
    longest: int | None = None,
    device: str = "cpu",
    openrlhf: "OpenRLHFSettings | None" = None,
) -> Path:
    """Does what `turnwise.rl.fine_tune.fine_tune` does, under a progress bar; where told to, on OpenRLHF."""
    from turnwise.rl.fine_tune import fine_tune  # torch: only where it is needed
    from turnwise.rl.openrlhf.sft import fine_tune_openrlhf

    with stages_shown(console) as on_progress:
        tuned = partial(fine_tune_openrlhf, openrlhf=openrlhf) if openrlhf else partial(fine_tune, device=device)
        return tuned(
            model, data, settings, folder, seed=seed, together=together, longest=longest,
            on_step=lambda step, loss: on_progress(folder.name, step, settings.steps),
        )  # fmt: skip


def report_shown(folders: Sequence[Path], output: Path, tokenizers: Sequence[Path], console: Console) -> "Written":
    """Does what `turnwise.analysis.report.write_report` does, under a progress bar."""
    from turnwise.analysis.report import write_report  # only where it is asked for

    with stages_shown(console) as on_progress:
        return write_report(folders, output, tokenizers=tokenizers, on_progress=on_progress)


def show_thoughts(by_samples: "Mapping[int, Sequence[WeighedChain]]", console: Console, *, folder: Path) -> None:
    """Prints what the thoughts of chains are worth, weighed by so many continuations of each prefix; draws figures.

    The tables, and all figures but the one that compares them, are of the most continuations.
    """
    from turnwise.analysis import thoughts  # matplotlib: only where it is asked for

    weighed = by_samples[max(by_samples)]
    console.print(thoughts.thought_statistics(weighed), thoughts.kinds(weighed))
    folder.mkdir(parents=True, exist_ok=True)
    thoughts.success_by_thoughts(weighed).savefig(folder / "success.png")
    thoughts.scores_by_position(by_samples).savefig(folder / "scores.png")
    telling = max(weighed, key=lambda one: (1 < sum(one.long) < 4, len(one.long)))
    thoughts.chain_picture(telling).savefig(folder / "chain.png")


def _in_words(summary: Summary) -> str:
    low, high = summary.interval
    told = f"{summary.accuracy:.1%} right ({low:.1%} to {high:.1%}) in {summary.tokens:.1f} tokens"
    return told if summary.think_share is None else f"{told}, thinks {summary.think_share:.0%}"


def conversation(episode: Episode) -> Panel:
    """One episode as people would read it: the problem, who said what, and how it was graded."""
    seats = list(dict.fromkeys(step.seat for step in episode.transcript.steps))
    parts = [Text(episode.transcript.problem.statement, style="bold")]
    parts += (said(step.seat, step.text, seats) for step in episode.transcript.steps)
    return Panel(Group(*parts, verdict(episode)), title=escape(episode.id), title_align="left", border_style="dim")


def said(seat: str, text: str, seats: Sequence[str]) -> Text:
    """What a seat said, in the colour that it has among all seats."""
    style = SEAT_STYLES[seats.index(seat) % len(SEAT_STYLES)]
    return Text(f"{seat}: ", style=f"bold {style}").append(text.strip(), style=style)


def verdict(episode: Episode) -> Text:
    """How an episode was graded, and what it took."""
    gold = episode.transcript.problem.answer
    failed = "not graded" if episode.error is None else f"failed: {episode.error}"
    told = f"{episode.grade.outcome}, the answer is {gold}" if episode.grade else failed
    return Text(f"{told} ({episode.transcript.token_count} tokens)", style="green" if episode.right else "red")
