"""The command `turnwise`. Each command imports what only it needs, so that `--help` is quick."""

from typing import Annotated

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


def main() -> None:
    """Runs the command line. What a user must mend is one line on stderr, and exit code 2."""
    run_app(app)
