"""The command `turnwise`. Each command imports what only it needs, so that `--help` is quick."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Console

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


@app.command(no_args_is_help=True)
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER…", help="Training runs, episode stores, or files of episodes.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
    tokenizer: Annotated[
        list[Path] | None,
        typer.Option(help="A folder with the tokenizer of the token ids; that of a training run is found there."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Tell what was written as JSON.")] = False,
) -> None:
    """Shows runs side by side in one HTML file: figures, tables, and every conversation, token by token.

    The file holds all that it needs: it opens from disk, and no network is asked for anything.

    turnwise report runs/train_longshort

    turnwise report runs/before runs/after other/episodes.jsonl -o compare.html
    """
    from turnwise.show import report_shown

    written = report_shown(folders, output, tokenizer or (), Console(stderr=True))
    if as_json:
        typer.echo(orjson.dumps(asdict(written), default=str))
    else:
        runs = f"{written.runs} run{'' if written.runs == 1 else 's'}"
        typer.echo(f"{written.path}: {written.episodes:,} episodes of {runs}, {written.bytes / 1e6:.1f} MB")


def main() -> None:
    """Runs the command line. What a user must mend is one line on stderr, and exit code 2."""
    run_app(app)
