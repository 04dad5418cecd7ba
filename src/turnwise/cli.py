"""The command `turnwise`. Each command imports what only it needs, so that `--help` is quick."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from turnwise import __version__
from turnwise.command import run_app

app = typer.Typer(name="turnwise", no_args_is_help=True, pretty_exceptions_enable=False)


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def turnwise(
    version: Annotated[bool, typer.Option("--version", callback=_tell_version, is_eager=True)] = False,
) -> None:
    """Language models reason together in turns, and are trained together to be right and brief."""


@app.command(
    # What stands behind the recipe is the recipe's: --help, too.
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    options_metavar="",
)
def train(
    context: typer.Context,
    recipe: Annotated[
        str, typer.Argument(help="longshort, thinkless, or a file with a recipe of your own: FILE.py or FILE.py:NAME.")
    ],
) -> None:
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


Policies = Annotated[list[str], typer.Option("--policy", help="NAME=MODEL, a checkpoint folder or hub id; repeatable.")]
Seats = Annotated[list[str], typer.Option("--seats", help="NAME=seat,seat: whom a policy fills, else the seat NAME.")]
Config = Annotated[Path | None, typer.Option("--config", help="TOML tables: openrlhf, learner, training, machine.")]
ProtocolName = Annotated[Literal["longshort", "thinkless"], typer.Option("--protocol")]
AsJSON = Annotated[bool, typer.Option("--json", help="For a machine to read.")]


@app.command()
def plan(
    policy: Policies,
    seats: Seats = [],  # noqa: B006  # typer copies it
    protocol: ProtocolName = "longshort",
    config: Config = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of the longest prompt, instructions and all.")] = 512,
    gpu_hour_price: Annotated[float | None, typer.Option(min=0.01, help="In any currency.")] = None,
    as_json: AsJSON = False,
) -> None:
    """Predict placement, memory and cost of a run on OpenRLHF, before anything starts.

    turnwise plan --policy long=Qwen/Qwen2.5-7B-Instruct --policy short=Qwen/Qwen2.5-7B-Instruct --config run.toml
    """
    from turnwise.job import read_job, show_plan

    show_plan(read_job(policy, seats, protocol, config), prompt_tokens, gpu_hour_price, as_json=as_json)


@app.command()
def doctor(
    policy: Policies,
    seats: Seats = [],  # noqa: B006
    protocol: ProtocolName = "longshort",
    config: Config = None,
    problems: Annotated[str, typer.Option(help="An arithmetic set, a benchmark, or a file.")] = "mixed",
    as_json: AsJSON = False,
) -> None:
    """Play 8 scripted episodes through the run's tokenizers, tags and graders. Exit code 1 where anything failed.

    turnwise doctor --policy solver=Vinnnf/Thinkless-1.5B-Warmup --protocol thinkless --problems gsm8k
    """
    from turnwise.job import read_job, show_examination

    if not show_examination(read_job(policy, seats, protocol, config), problems, as_json=as_json):
        raise typer.Exit(1)


def main() -> None:
    """Runs the command line. What a user must mend is one line on stderr, and exit code 2."""
    run_app(app)
