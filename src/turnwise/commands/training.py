"""Commands that train, and that tell beforehand what training will take."""

from typing import Annotated

import typer

from turnwise.command import AsJson, load_quietly, read_config

app = typer.Typer()

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

    from turnwise.show import show_trained, train_shown
    from turnwise.train import open_trainer, recipe_called

    settings = read_config(recipe_called(recipe), context.args, program=f"turnwise train {recipe}")
    load_quietly()
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
    from turnwise.precheck import show_plan
    from turnwise.train import recipe_called

    as_json = _take_json(context.args) or as_json
    show_plan(read_config(recipe_called(recipe), context.args, program=f"turnwise plan {recipe}"), as_json=as_json)


@app.command(context_settings=SETTINGS_FOLLOW)
def doctor(context: typer.Context, recipe: RecipeName, as_json: AsJson = False) -> None:
    """Plays 8 scripted episodes through a recipe's tokenizers, tags and graders. Exit code 1 where anything failed.

    No weights are loaded: it finds in seconds what would else fail after hours. Behind the recipe stand its settings.

    turnwise doctor thinkless --model Vinnnf/Thinkless-1.5B-Warmup --train gsm8k
    """
    from turnwise.precheck import show_examination
    from turnwise.train import recipe_called

    as_json = _take_json(context.args) or as_json
    settings = read_config(recipe_called(recipe), context.args, program=f"turnwise doctor {recipe}")
    if not show_examination(settings, as_json=as_json):
        raise typer.Exit(1)


def _take_json(arguments: list[str]) -> bool:
    """Whether --json stands behind the recipe too, from where it is taken: it is no setting of the recipe's."""
    found = "--json" in arguments
    arguments[:] = [word for word in arguments if word != "--json"]
    return found


@app.command("cold-start", context_settings={**SETTINGS_FOLLOW, "help_option_names": []}, options_metavar="")
def start_cold(context: typer.Context) -> None:
    """Makes a first long-thought and a first short-thought model of long chains of thought; killed, it goes on.

    Its settings are --config FILE.toml, and dotted flags: turnwise cold-start --help lists them all.

    turnwise cold-start --chains r1.jsonl --base Qwen/Qwen2.5-7B-Instruct --completer Qwen/Qwen2.5-7B-Instruct
    """
    from rich.console import Console

    from turnwise.cold_start import ColdStartRecipe, cold_start

    settings = read_config(ColdStartRecipe, context.args, program="turnwise cold-start")
    load_quietly()
    console = Console()
    for seat, folder in cold_start(settings, console).items():
        console.print(f"{seat}: {folder}", highlight=False)
