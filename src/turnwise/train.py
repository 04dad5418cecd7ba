"""Runs recipes: which one a command means, where its policies are trained, and on which problems."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from turnwise.environments.environment import Environment
from turnwise.environments.errors import InputError
from turnwise.environments.math_grader import MathGrader
from turnwise.named import load_file
from turnwise.precheck import examination
from turnwise.rl.openrlhf.installed import require_openrlhf
from turnwise.rl.recipe import LongShortRecipe, Recipe, ThinklessRecipe
from turnwise.rl.trained_policy import Backend, EmbeddedPolicy
from turnwise.rl.trainer import Trainer
from turnwise.show import open_environment

RECIPES: dict[str, type[Recipe]] = {"longshort": LongShortRecipe, "thinkless": ThinklessRecipe}


def recipe_called(name: str) -> type[Recipe]:
    """A recipe of turnwise by its name, or that of a Python file: FILE.py, or FILE.py:NAME where it has several.

    The file runs as a script would, with its own folder in the path. Raises InputError where there is no such recipe.
    """
    if name in RECIPES:
        return RECIPES[name]
    path, _, wanted = name.partition(":")
    file = Path(path)
    if file.suffix != ".py":
        raise InputError(f"a recipe is one of {', '.join(RECIPES)}, or a Python file that has one; got {name!r}")
    module = load_file(file)
    found = {
        own: value
        for own, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Recipe) and value.__module__ == module.__name__
    }
    if wanted and wanted in found:
        return found[wanted]
    if wanted or len(found) != 1:
        raise InputError(
            f"{file} must define one subclass of turnwise.rl.recipe.Recipe, or the command name one of several by "
            f"{file}:NAME; it defines {', '.join(found) or 'none'}{f', not {wanted}' if wanted else ''}"
        )
    (only,) = found.values()
    return only


@contextmanager
def open_trainer(recipe: Recipe) -> Iterator[Trainer]:
    """The trainer of a recipe, whose policies and grader live until the end of the `with`."""
    with MathGrader() as grader:
        protocol, policies, partners = recipe.protocol(), recipe.policies(), recipe.partners()
        train = open_environment(recipe.train, grader, number=recipe.train_problems, seed=0, split="train")
        test = open_environment(recipe.test, grader, number=recipe.test_problems, seed=0)
        if recipe.backend == "openrlhf":
            _examine(recipe, train)
        with (
            open_backend(recipe) as backend,  # not before all else is known to be right: it may start a cluster
            Trainer(
                protocol, policies, train, test, recipe.training, recipe.output, partners=partners, backend=backend
            ) as trainer,
        ):
            yield trainer


def _examine(recipe: Recipe, environment: Environment) -> None:
    """Raises InputError for the first of what the doctor finds, before any process starts."""
    for check in examination(recipe, environment):
        if not check.kept:
            raise InputError(f"{check.what} ({check.of}): {check.fault}")


@contextmanager
def open_backend(recipe: Recipe) -> Iterator[Backend]:
    """Where a recipe's policies are trained. What was started for them ends with the `with`."""
    if recipe.backend == "embedded":
        yield partial(EmbeddedPolicy, device=recipe.device)
        return
    require_openrlhf()
    address = recipe.ray_address or os.environ.get("RAY_ADDRESS")
    if address is None:
        # Read as Ray is imported: on one machine it then listens on the loopback device alone.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    from turnwise.rl.openrlhf.policy import OpenRLHFBackend

    started = not ray.is_initialized()
    if started:
        settings = recipe.openrlhf
        _connect(address, processes=len(recipe.policies()) * (settings.ranks + settings.actors))
    try:
        yield OpenRLHFBackend(recipe.openrlhf, interrupts=recipe.training.staleness > 0)
    finally:
        if started:
            ray.shutdown()


def _connect(address: str | None, *, processes: int) -> None:
    """Connects to the cluster at an address, or starts a Ray for so many processes that ends with this one."""
    import ray

    try:
        if address is None:
            # Each process asks for a core. On a small machine they share them, and are slow rather than refused.
            cores = max(processes, os.cpu_count() or 1)
            ray.init("local", num_cpus=cores, include_dashboard=False, log_to_driver=False)
        else:
            ray.init(address, log_to_driver=False)
    except Exception as error:  # Ray raises that class itself where a busy machine takes more than 30 s to start it
        raise InputError(
            f"no Ray at {address or 'this machine'}: {str(error).splitlines()[0]}; have ray start --head run at the "
            "address, or give none, on a machine that is not too busy, to have one started"
        ) from error
