"""What can be known of a recipe before anything starts: where it would run, what that takes, what would fail."""

import orjson
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from turnwise.analysis.plan_tables import dialogues, estimated, memory, placement
from turnwise.environments.environment import Environment
from turnwise.environments.errors import InputError
from turnwise.environments.math_grader import MathGrader
from turnwise.protocols.graph import GraphProtocol
from turnwise.rl.doctor import Check, examine
from turnwise.rl.openrlhf.estimate import estimate
from turnwise.rl.openrlhf.plan import plan
from turnwise.rl.recipe import Recipe
from turnwise.show import open_environment


def show_plan(recipe: Recipe, *, as_json: bool = False) -> None:
    """Prints the plan of a recipe and, where all of it runs on GPUs, the estimate.

    Raises InputError where it does not fit the machine.
    """
    protocol, policies, settings = graph_of(recipe), recipe.policies(), recipe.openrlhf
    planned = plan(policies, settings, protocol, recipe.machine, prompt_tokens=recipe.prompt_tokens)
    found = None
    if settings.gpus_per_rank and settings.gpus_per_actor:  # of a CPU's arithmetic nothing is known
        found = estimate(
            planned, policies, settings, protocol, recipe.training, recipe.assumptions,
            prompt_tokens=recipe.prompt_tokens,
        )  # fmt: skip
    if as_json:
        options = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS
        written = orjson.dumps({"plan": planned, "estimate": found}, default=BaseModel.model_dump, option=options)
        print(written.decode())
        return
    console = Console()
    console.print(placement(planned))
    if planned.gpus:
        console.print(memory(planned))
        for node, size in planned.main_memory.items():
            if size:
                console.print(f"and {size / 1e9:.1f} GB in the main memory of node {node}, moved there in turns")
    console.print(dialogues(planned))
    if found:
        console.print(estimated(found))
    for note in (*planned.notes, *(found.assumed if found else ())):
        console.print(f"- {note}", markup=False, highlight=False)


def show_examination(recipe: Recipe, *, as_json: bool = False) -> bool:
    """Prints what the doctor found of a recipe; whether nothing is at fault."""
    with MathGrader(workers=1) as grader:
        problems = open_environment(recipe.train, grader, number=recipe.train_problems, seed=0, split="train")
        checks = examination(recipe, problems)
    console, failed = Console(), [check for check in checks if not check.kept]
    if as_json:
        print(orjson.dumps(checks, option=orjson.OPT_INDENT_2).decode())
        return not failed
    table = Table("", "of", "")
    for check in checks:
        table.add_row(check.what, escape(check.of), "kept" if check.kept else Text(check.fault, style="red"))
    console.print(table)
    console.print(f"{len(checks) - len(failed)} of {len(checks)} checks kept")
    return not failed


def examination(recipe: Recipe, environment: Environment) -> list[Check]:
    """Every check of the doctor's on a recipe."""
    return examine(
        graph_of(recipe), recipe.policies(), environment, partners=tuple(recipe.partners()),
        context=recipe.openrlhf.context if recipe.backend == "openrlhf" else None,
    )  # fmt: skip


def graph_of(recipe: Recipe) -> GraphProtocol:
    """The recipe's protocol. Raises InputError where it is none that can be walked through."""
    protocol = recipe.protocol()
    if not isinstance(protocol, GraphProtocol):
        raise InputError(f"only a protocol that is a graph can be foreseen; {type(protocol).__name__} is none")
    return protocol
