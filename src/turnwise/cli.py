"""What the command line and the examples share: problems by name, progress to watch, and one-line errors."""

import asyncio
import hashlib
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import typer
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from turnwise.analysis.tables import comparison, levels
from turnwise.environments.arithmetic import PROBLEM_SETS, arithmetic
from turnwise.environments.environment import Environment, Grader
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.protocols.graph import GraphProtocol
from turnwise.rl.episode_store import EpisodeStore
from turnwise.rl.rollout import Team, in_order, rollout

SEAT_STYLES = ("cyan", "yellow", "green", "magenta", "blue")


def run(main: Callable[..., None]) -> None:
    """Runs a script's `main` with its flags. What a user must mend is one line on stderr, and exit code 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except InputError as error:
        Console(stderr=True, soft_wrap=True).print(Text(f"error: {error}", style="red"))
        sys.exit(2)


def open_environment(problems: str, grader: Grader, *, number: int, seed: int) -> Environment:
    """An arithmetic problem set, a benchmark by its name, or a local JSONL, JSON or Parquet file.

    Raises InputError for anything else, for a file that cannot be read, and for a number below 1.
    """
    if number < 1:
        raise InputError(f"the number of problems must be at least 1; got {number}")
    if problems in PROBLEM_SETS:
        return arithmetic(grader, problem_set=problems, count=number, seed=seed)
    from turnwise.environments.benchmarks import BENCHMARKS, load_benchmark, load_problems  # datasets: only if needed

    if problems in BENCHMARKS:
        loaded = load_benchmark(BENCHMARKS[problems], limit=number)
    elif Path(problems).suffix:
        loaded = load_problems(problems, limit=number)
    else:
        named = ", ".join([*PROBLEM_SETS, *BENCHMARKS])
        raise InputError(f"no problems are called {problems!r}; name one of {named}, or a JSONL, JSON or Parquet file")
    if loaded.dropped:
        Console(stderr=True).print(f"{problems}: {loaded}")
    return Environment(problems, loaded.problems, grader)


def play_shown(
    title: str,
    protocol: GraphProtocol,
    team: Team,
    environment: Environment,
    console: Console,
    *,
    seed: int = 0,
    shown: int = 0,
    output: Path | None = None,
    settings: dict[str, str | int | float] | None = None,
) -> list[Episode]:
    """Plays every problem once under a progress bar, and prints the first `shown` conversations as they end.

    With an `output` folder the episodes are kept in a subfolder named after `title`; what is there already is not
    played again. `settings` is what, besides protocol, problems and seed, must be equal for that.
    """
    graph = hashlib.blake2b(protocol.graph.model_dump_json().encode(), digest_size=8).hexdigest()
    played = {"protocol": type(protocol).__name__, "graph": graph, "problems": environment.name}
    described = {**played, "seed": seed, **(settings or {})}
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        EpisodeStore(output / title.replace(" ", "-"), described) if output else nullcontext() as store,
        Progress(*columns, console=console) as progress,
    ):
        episodes = in_order(environment, (episode for episode in store or () if episode.error is None))
        already = len(episodes)
        task = progress.add_task(title, total=len(environment.problems), completed=already)

        async def watch() -> None:
            async for episode in rollout(protocol, team, environment, seed=seed, store=store):
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
    title = f"{len(environment.problems)} problems of {environment.name}"
    console.print(comparison(runs, baseline=baseline, title=title))
    if len({problem.level for problem in environment.problems}) > 1:
        console.print(levels(runs, title="Right, in how many tokens, by level"))
    if plot:
        from turnwise.analysis.plots import accuracy_over_tokens  # matplotlib: only where it is asked for

        accuracy_over_tokens(runs, title=title).savefig(plot)


def conversation(episode: Episode) -> Panel:
    """One episode as people would read it: the problem, who said what, and how it was graded."""
    seats = list(dict.fromkeys(step.seat for step in episode.transcript.steps))
    parts = [Text(episode.transcript.problem.statement, style="bold")]
    for step in episode.transcript.steps:
        style = SEAT_STYLES[seats.index(step.seat) % len(SEAT_STYLES)]
        parts.append(Text(f"{step.seat}: ", style=f"bold {style}").append(step.text.strip(), style=style))
    gold = episode.transcript.problem.answer
    verdict = f"{episode.grade.outcome}, the answer is {gold}" if episode.grade else f"failed: {episode.error}"
    verdict += f" ({episode.transcript.token_count} tokens)"
    parts.append(Text(verdict, style="green" if episode.right else "red"))
    return Panel(Group(*parts), title=episode.id, title_align="left", border_style="dim")
