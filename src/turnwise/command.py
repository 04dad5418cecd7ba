"""Scripts as commands: their flags, their configs, and errors in one line."""

import sys
import tomllib
from argparse import ArgumentError, ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.text import Text

from turnwise.environments.errors import InputError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]

C = TypeVar("C", bound=BaseModel)

EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "jaxtyping", "pydantic_settings", "tensorboard"), "train"),
    "datasets": "data", "pyarrow": "data", "matplotlib": "plots", "json_repair": "cold-start",
}  # fmt: skip
"""The extra of turnwise with which a package comes, and with it all else that the same commands import."""


def run(main: Callable[..., None]) -> None:
    """Runs a script's `main` with its flags. What a user must mend is one line on stderr, and exit code 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    run_app(app)


def run_configured(main: Callable[[C], None], config: type[C]) -> None:
    """Runs a script's `main` with a config: its defaults, then the TOML file of `--config`, then the other flags.

    A nested setting is a table in the file and a dotted flag: `--learner.loss.alpha 0.5`. Errors are as `run` shows
    them; the docstring of `config` is what `--help` says.
    """

    def configured() -> None:
        settings = read_config(config, sys.argv[1:])
        load_quietly()
        main(settings)

    run_app(configured)


def read_config(config: type[C], arguments: list[str], *, program: str | None = None) -> C:
    """The config that a command line asks for. Raises InputError for a file or a setting that it cannot use.

    `program` is what `--help` calls the command, by default the script's name.
    """
    # argparse's heavy sister: only where a config is read
    from pydantic_settings import BaseSettings, CliApp, InitSettingsSource, SettingsConfigDict, SettingsError

    files = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    files.add_argument("--config", type=Path)
    try:
        known, flags = files.parse_known_args(arguments)
    except ArgumentError as error:
        raise InputError(f"{error}; --help lists all flags") from None
    written: dict[str, object] = {}
    if known.config is not None:
        try:
            written = tomllib.loads(known.config.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"--config must name a TOML file; {known.config} cannot be read: {error}") from None

    class Settings(BaseSettings, config):  # type: ignore[misc, valid-type]
        __doc__ = f"{config.__doc__} --config FILE reads settings from a TOML file; the other flags go over them."
        model_config = SettingsConfigDict(
            nested_model_default_partial_update=True, case_sensitive=True, cli_hide_none_type=True,
            cli_avoid_json=True, cli_implicit_flags=True, cli_kebab_case=True, cli_exit_on_error=False,
            cli_prog_name=program,
        )  # fmt: skip

        @classmethod
        def settings_customise_sources(  # type: ignore[override]
            cls, settings_cls: type[BaseSettings], **_: object
        ) -> tuple[InitSettingsSource, ...]:
            return (InitSettingsSource(settings_cls, written),)  # and not the environment's variables

    try:
        read = CliApp.run(Settings, cli_args=flags)
    except ValidationError as refused:
        raise InputError(faults_in(refused)) from None
    except SettingsError as error:
        raise InputError(f"{error}; --help lists all flags") from None
    return config(**{name: getattr(read, name) for name in config.model_fields})


def load_quietly() -> None:
    """Models load without the progress bars of transformers: one a file would drown what is shown."""
    from transformers.utils import logging  # slow to import: only where a model is loaded

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def run_app(command: Callable[[], object]) -> None:
    """Runs a command; what a user must mend is one line on stderr, and exit code 2."""
    try:
        command()
    except InputError as error:
        _refuse(str(error))
    except ValidationError as refused:  # such as a graph that a recipe makes of its settings
        _refuse(f"{refused.title}: {faults_in(refused)}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        _refuse(f"this command needs the package {package}: pip install 'turnwise[{EXTRAS[package]}]'")


def faults_in(refused: ValidationError) -> str:
    """In one line where and why pydantic refuses something, and what came, unless that is a whole table."""
    found = []
    for error in refused.errors():
        place = ".".join(map(str, error["loc"]))
        told = error["msg"].removeprefix("Value error, ")
        got = "" if isinstance(error["input"], dict) else f"; got {error['input']!r}"
        found.append(f"{place}: {told}{got}" if place else f"{told}{got}")
    return "; ".join(found)


def _refuse(fault: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(Text(f"error: {fault}", style="red"))
    sys.exit(2)
