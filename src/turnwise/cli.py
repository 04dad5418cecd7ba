"""The command `turnwise`. Each command imports what only it needs, so that `--help` is quick."""

from typing import Annotated

import typer

from turnwise import __version__
from turnwise.command import run_app
from turnwise.commands import looking, playing, training

app = typer.Typer(name="turnwise", no_args_is_help=True, pretty_exceptions_enable=False)
for commands in (playing, training, looking):
    app.add_typer(commands.app)


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def turnwise(
    version: Annotated[bool, typer.Option("--version", callback=_tell_version, is_eager=True)] = False,
) -> None:
    """Language models reason together in turns, and are trained together to be right and brief."""


def main() -> None:
    """Runs the command line. What a user must mend is one line on stderr, and exit code 2."""
    run_app(app)
