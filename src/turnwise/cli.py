"""The command `turnwise`. Each command imports what only it needs, so that `--help` is quick."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from turnwise import __version__
from turnwise.command import run_app

app = typer.Typer(name="turnwise", no_args_is_help=True, pretty_exceptions_enable=False)
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
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
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


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def turnwise(
    version: Annotated[bool, typer.Option("--version", callback=_tell_version, is_eager=True)] = False,
) -> None:
    """Language models reason together in turns, and are trained together to be right and brief."""


RecipeName = Annotated[
    str, typer.Argument(help="longshort, thinkless, or a file with a recipe of your own: FILE.py or FILE.py:NAME.")
]
# What stands behind the recipe is the recipe's: --help, too.
SETTINGS_FOLLOW = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


@app.command(context_settings=SETTINGS_FOLLOW, options_metavar="")
def train(context: typer.Context, recipe: RecipeName) -> None:
    """Trains policies together, as a recipe says; killed, the same command goes on.

    Behind the recipe stand its settings: --config FILE.toml, and dotted flags, which go over it. turnwise train
    longshort --help lists them all.

    turnwise train longshort --config examples/openrlhf/longshort_tiny.toml --training.seed 1 --output runs/seed-1
    """
    from rich.console import Console
    from transformers.utils import logging

    from turnwise.command import read_config
    from turnwise.show import show_trained, train_shown
    from turnwise.train import open_trainer, recipe_called

    settings = read_config(recipe_called(recipe), context.args, program=f"turnwise train {recipe}")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # one a file would drown the line of training
    console = Console()
    with open_trainer(settings) as trainer:
        train_shown(trainer, console)
    show_trained(trainer, console)


@app.command(context_settings=SETTINGS_FOLLOW)
def plan(context: typer.Context, recipe: RecipeName, as_json: AsJson = False) -> None:
    """Predicts where each process of a recipe runs on OpenRLHF, the memory of each GPU, time and cost.

    Nothing is started, and no weights are loaded. Behind the recipe stand its settings, as those of turnwise train.

    turnwise plan longshort --config examples/openrlhf/longshort_qwen_7b.toml --assumptions.gpu-hour-price 2.5
    """
    from turnwise.command import read_config
    from turnwise.precheck import show_plan
    from turnwise.train import recipe_called

    show_plan(read_config(recipe_called(recipe), context.args, program=f"turnwise plan {recipe}"), as_json=as_json)


@app.command(context_settings=SETTINGS_FOLLOW)
def doctor(context: typer.Context, recipe: RecipeName, as_json: AsJson = False) -> None:
    """Plays 8 scripted episodes through a recipe's tokenizers, tags and graders. Exit code 1 where anything failed.

    No weights are loaded: it finds in seconds what would else fail after hours. Behind the recipe stand its settings.

    turnwise doctor thinkless --model Vinnnf/Thinkless-1.5B-Warmup --train gsm8k
    """
    from turnwise.command import read_config
    from turnwise.precheck import show_examination
    from turnwise.train import recipe_called

    settings = read_config(recipe_called(recipe), context.args, program=f"turnwise doctor {recipe}")
    if not show_examination(settings, as_json=as_json):
        raise typer.Exit(1)


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
    tokens, console = "sampled tokens", Console(stderr=as_json)
    with ExitStack() as opened:
        environment = open_environment(
            problems, opened.enter_context(open_grader(answer_marker)), number=number, seed=0
        )
        if solutions is not None:
            entries = solution_entries(solutions, environment, played, samples=samples, tokenizer=tokenizer)
            tokens = f"of {tokenizer} in the stored texts" if tokenizer else "words of the stored texts"
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
            tokens=tokens,
            answer_marker=answer_marker or "",
        )
    if as_json:
        typer.echo(result.json, nl=False)
    else:
        show_evaluation(result, runs, console)


def _settings(named: dict[str, str], engine: str, temperature: float) -> dict[str, str | int | float]:
    """What must be equal where a run is resumed, besides protocol, problems and seed."""
    return {**{f"seat {seat}": who for seat, who in named.items()}, "engine": engine, "temperature": temperature}


@app.command("audit")
def audit(
    folder: Annotated[Path, typer.Argument(help="Of an episode store, or of a run that holds some.")],
    tokenizer: Annotated[Path | None, typer.Option(help="The folder of the run's tokenizer.")] = None,
    as_json: AsJson = False,
) -> None:
    """Proves that what trains is exactly what was sampled, in each episode store in FOLDER. Exit code 1: it is not.

    turnwise audit runs/first --tokenizer agents/tiny/long

    With the tokenizer, it also proves that nothing was tokenised a second time.
    """
    from turnwise.analysis.audit import main

    main(folder, tokenizer, as_json=as_json)


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

    graph = graph_of(open_protocol(protocol), protocol)
    if output is None:
        typer.echo(mermaid(graph), nl=False)
    else:
        draw(graph, output)
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


def main() -> None:
    """Runs the command line. What a user must mend is one line on stderr, and exit code 2."""
    run_app(app)
