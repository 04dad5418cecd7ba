"""The command `turnwise`. Each command imports what only it needs, so that `--help` is quick."""

import typer

from turnwise.command import run_app

app = typer.Typer(
    name="turnwise",
    help="Language models reason together in turns, and are trained together to be right and brief.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Runs the command line. What a user must mend is one line on stderr, and exit code 2."""
    run_app(app)
