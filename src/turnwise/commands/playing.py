"""Commands that play: conversations to look at, evaluations, and protocols by themselves."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from turnwise.command import AsJson

app = typer.Typer()
protocols = typer.Typer(no_args_is_help=True, help="Look at a protocol: what it is, and whether it can be played.")
app.add_typer(protocols, name="protocol")

PROBLEM_SETS = ("easy", "mixed", "hard")
BENCHMARKS = (
    "math-500", "gsm8k", "aime-2024", "aime-2025", "amc-2023", "minerva-algebra", "gpqa-diamond", "math-train",
    "deepscaler",
)  # fmt: skip
PROTOCOLS = ("longshort", "thinkless", "always-think", "never-think", "gated", "solo", "debate", "panel")

# What several commands ask for.

ProtocolName = Annotated[
    str,
    typer.Argument(
        metavar="PROTOCOL",
        help=f"{', '.join(PROTOCOLS)}, or a protocol in a Python file: FILE.py:NAME.",
        autocompletion=lambda: list(PROTOCOLS),
    ),
]
PROBLEMS_HELP = (
    f"Arithmetic ({', '.join(PROBLEM_SETS)}), a benchmark ({', '.join(BENCHMARKS)}), a local copy of one "
    "(BENCHMARK=FILE), or a JSONL, JSON or Parquet file with the columns problem and answer."
)
Seats = Annotated[
    list[str] | None,
    typer.Option(
        "--seat",
        metavar="SEAT=WHO",
        help="Who fills a seat: a model (a folder, a hub id, or tiny-long, tiny-short, tiny-router), or an agent in a "
        "Python file, FILE.py:NAME (lines, or a function of turn and seed). Without SEAT=, all other seats.",
    ),
]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Budget of each turn, in place of the protocol's own.")]
AnswerMarker = Annotated[
    str | None, typer.Option(help="What answers stand behind, such as '####', where they are in no \\boxed{}.")
]
_MODELS = "Models"
EngineName = Annotated[Literal["transformers", "vllm", "server"], typer.Option(rich_help_panel=_MODELS)]
Temperature = Annotated[float, typer.Option(min=0.0, rich_help_panel=_MODELS)]
Device = Annotated[str, typer.Option(help="Of transformers; vLLM takes the GPU.", rich_help_panel=_MODELS)]
Urls = Annotated[
    list[str] | None,
    typer.Option("--url", help="A server's base URL, or SEAT=URL for each seat.", rich_help_panel=_MODELS),
]
KeyVariable = Annotated[
    str, typer.Option(help="The environment variable that holds the server's key.", rich_help_panel=_MODELS)
]
CacheGigabytes = Annotated[
    float, typer.Option(help="What each vLLM engine takes beside its weights.", rich_help_panel=_MODELS)
]
Context = Annotated[int | None, typer.Option(help="Of vLLM; else the model's own.", rich_help_panel=_MODELS)]


@app.command("play")
def play(
    protocol: ProtocolName,
    seat: Seats = None,
    problems: Annotated[str, typer.Option(help=PROBLEMS_HELP)] = "mixed",
    number: Annotated[int, typer.Option(help="How many problems.")] = 3,
    seed: int = 0,
    max_tokens: MaxTokens = None,
    answer_marker: AnswerMarker = None,
    output: Annotated[Path | None, typer.Option(help="Folder that keeps the episodes.")] = None,
    as_json: AsJson = False,
    engine: EngineName = "transformers",
    temperature: Temperature = 0.6,
    device: Device = "cpu",
    url: Urls = None,
    key_variable: KeyVariable = "",
    cache_gigabytes: CacheGigabytes = 1.0,
    context: Context = None,
) -> None:
    """Plays a few conversations, and shows them as they happen.

    turnwise play longshort --seat long=tiny-long --seat short=tiny-short

    turnwise play my_protocol.py:jury --seat clerk=my_protocol.py:count_votes --seat tiny-short --number 5

    With --json, each episode is a line, as in an episode store. Exit code 1: an episode failed.
    """
    from contextlib import nullcontext

    from rich.console import Console

    from turnwise.live import play_live
    from turnwise.named import Sampling, open_protocol, seated, seats_named
    from turnwise.rl.episode_store import EpisodeStore, encode
    from turnwise.show import open_environment, open_grader

    played = open_protocol(protocol, max_tokens=max_tokens)
    named = seats_named(played, seat or [])
    sampling = Sampling(engine, temperature, device, tuple(url or ()), key_variable, cache_gigabytes, context)
    with open_grader(answer_marker) as grader, seated(named, sampling) as team:
        environment = open_environment(problems, grader, number=number, seed=0)
        run = _settings(named, engine, temperature) | {"answer_marker": answer_marker or ""}
        run |= {"protocol": played.fingerprint, "problems": environment.name, "seed": seed}
        with EpisodeStore(output, run) if output else nullcontext() as store:
            episodes = play_live(played, team, environment, Console(stderr=as_json), seed=seed, store=store)
    if as_json:
        for episode in episodes:
            typer.echo(encode(episode))
    raise typer.Exit(int(any(episode.error for episode in episodes)))


@app.command("eval")
def evaluate(
    problems: Annotated[str, typer.Argument(help=PROBLEMS_HELP, autocompletion=lambda: [*PROBLEM_SETS, *BENCHMARKS])],
    protocol: Annotated[
        str,
        typer.Option(help=f"{', '.join(PROTOCOLS)}, or FILE.py:NAME.", autocompletion=lambda: list(PROTOCOLS)),
    ] = "solo",
    seat: Seats = None,
    replay: Annotated[
        Path | None, typer.Option(help="Instead of a team: the folder of a run, whose turns are taken again.")
    ] = None,
    solutions: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a team: JSON lines with the answers of one model or several, each with the problem's "
            '"id" or "question" and a "solution" (and "model"), or MODEL: {"solution": ...}.'
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="With --solutions: whose tokens are counted. Else words are.")
    ] = None,
    number: Annotated[int | None, typer.Option(help="The first so many problems; else all, of arithmetic 96.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Of each problem; else 1, or as many as are stored.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Of a run; give it several times for several runs.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="What AES is against: a model of --solutions, or the folder of an earlier run.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the episodes and evaluation.json; a stopped run goes on there.")
    ] = None,
    max_tokens: MaxTokens = None,
    answer_marker: AnswerMarker = None,
    as_json: AsJson = False,
    engine: EngineName = "transformers",
    temperature: Temperature = 0.6,
    device: Device = "cpu",
    url: Urls = None,
    key_variable: KeyVariable = "",
    cache_gigabytes: CacheGigabytes = 1.0,
    context: Context = None,
) -> None:
    """Evaluates a team on a benchmark: avg@k, pass@k, tokens, turns, what went wrong, with 95% intervals.

    turnwise eval hard --seat tiny-long --output runs/alone

    turnwise eval hard --protocol longshort --seat long=tiny-long --seat short=tiny-short --samples 4 --seed 0 --seed 1
    --baseline runs/alone

    turnwise eval gsm8k --solutions answers.jsonl --answer-marker 'A:'

    Intervals are by bootstrap over problems. Beside the result stands what the papers print of the same benchmark.
    """
    from contextlib import ExitStack

    from rich.console import Console

    from turnwise.environments.errors import InputError
    from turnwise.evaluating import Entry, evaluate_entries, replayed_entry, show_evaluation, solution_entries
    from turnwise.named import Sampling, open_protocol, seated, seats_named
    from turnwise.show import open_environment, open_grader

    if sum(source is not None for source in (seat, replay, solutions)) != 1:
        raise InputError("who answers must be said in one way: --seat MODEL, --replay FOLDER or --solutions FILE")
    if (seed and not seat) or (tokenizer and not solutions):
        raise InputError("--seed goes with --seat, and --tokenizer with --solutions; leave it out")
    played = open_protocol(protocol, max_tokens=max_tokens)
    named = seats_named(played, seat) if seat else {}
    console = Console(stderr=as_json)
    with ExitStack() as opened:
        environment = open_environment(
            problems, opened.enter_context(open_grader(answer_marker)), number=number, seed=0
        )
        if solutions is not None:
            entries = solution_entries(solutions, environment, played, samples=samples, tokenizer=tokenizer)
        elif replay is not None:
            environment, entries = replayed_entry(replay, environment, played, samples=samples)
        else:
            sampling = Sampling(engine, temperature, device, tuple(url or ()), key_variable, cache_gigabytes, context)
            team = opened.enter_context(seated(named, sampling))
            settings = _settings(named, engine, temperature)
            entries = [Entry(protocol, played, team, samples or 1, seed or [0], settings)]
        result, runs = evaluate_entries(
            entries,
            environment,
            console,
            baseline=baseline,
            output=output,
            answer_marker=answer_marker or "",
        )
    if as_json:
        typer.echo(result.json, nl=False)
    else:
        show_evaluation(result, runs, console)


def _settings(named: dict[str, str], engine: str, temperature: float) -> dict[str, str | int | float]:
    """What must be equal where a run is resumed, besides protocol, problems and seed."""
    return {**{f"seat {seat}": who for seat, who in named.items()}, "engine": engine, "temperature": temperature}


@protocols.command("draw")
def draw(
    protocol: ProtocolName,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A PNG; else Mermaid text is printed.")] = None,
) -> None:
    """Draws the turn graph: one colour a seat, the closing tags on the edges.

    turnwise protocol draw longshort -o graph.png

    turnwise protocol draw my_protocol.py:jury > graph.mmd
    """
    from turnwise.named import graph_of, open_protocol
    from turnwise.protocols.drawing import draw, mermaid  # matplotlib
    from turnwise.show import write_png

    graph = graph_of(open_protocol(protocol), protocol)
    if output is None:
        typer.echo(mermaid(graph), nl=False)
    else:
        write_png(output, lambda draft: draw(graph, draft))
        typer.echo(f"{output}: {len(graph.states)} states, {len(graph.seats)} seats")


@protocols.command("check")
def check(protocol: ProtocolName, as_json: AsJson = False) -> None:
    """Says what a protocol is, its most turns and tokens, and what is wrong with it. Exit code 1: a fault.

    turnwise protocol check my_protocol.py:jury

    The graph is checked, then tried out: agents that say anything play and are paid.
    """
    from rich.console import Console

    from turnwise.checking import check_protocol, show_check

    found = check_protocol(protocol)
    if as_json:
        typer.echo(found.json, nl=False)
    else:
        show_check(found, Console())
    raise typer.Exit(int(bool(found.faults)))
