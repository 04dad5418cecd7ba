"""What OpenRLHF is told: its own command line's flags, from settings of turnwise."""

import argparse
import ast
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from openrlhf.utils.config import hierarchize

from turnwise.rl.learner import LearnerSettings
from turnwise.rl.openrlhf.settings import OpenRLHFSettings

COMMAND = "openrlhf.cli.train_ppo_ray"


def command_line(command: str = COMMAND) -> argparse.ArgumentParser:
    """The parser of one of OpenRLHF's own commands, by its module.

    It stands below `if __name__ == "__main__":` in OpenRLHF 0.11.2, where it cannot be imported from: its statements,
    up to the parsing, are run here.
    """
    spec = find_spec(command)
    path = str(spec and spec.origin)
    module = ast.parse(Path(path).read_text())
    try:
        block = next(node.body for node in module.body if isinstance(node, ast.If))
        end = [ast.unparse(statement) for statement in block].index("args = parser.parse_args()")
    except (StopIteration, ValueError) as error:
        raise RuntimeError(f"{command} no longer builds its parser as OpenRLHF 0.11.2 does") from error
    names: dict[str, object] = {"argparse": argparse, "datetime": datetime}
    exec(compile(ast.Module(block[:end], []), path, "exec"), names)
    parser = names["parser"]
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def openrlhf_arguments(
    settings: OpenRLHFSettings, learner: LearnerSettings, *, steps: int, temperature: float
) -> SimpleNamespace:
    """OpenRLHF's nested arguments: the defaults of its command line, but for what the settings say.

    `steps` is the number of optimiser steps of the learning-rate schedule.
    """
    flags: dict[str, object] = {
        "actor.num_gpus_per_node": settings.ranks,
        "actor.adam.lr": learner.learning_rate,
        "actor.adam.weight_decay": learner.weight_decay,
        "actor.lr_scheduler": "constant_with_warmup" if learner.schedule == "constant" else learner.schedule,
        # OpenRLHF rounds steps · ratio up, which must not come out one step too long by a rounding error. A policy that
        # trains in no round has no steps.
        "actor.lr_warmup_ratio": max(0.0, learner.warmup - 0.5) / max(1, steps),
        "actor.max_norm": learner.clip,
        "rollout.temperature": temperature,
        # One micro-batch of each rank. How many make a step is said anew for each step.
        "train.batch_size": settings.ranks,
        "train.micro_batch_size": 1,
        "ds.zero_stage": settings.zero_stage,
        "ds.attn_implementation": settings.attention,
        "algo.kl.init_coef": 0,
        "vllm.num_engines": 0,
        "vllm.sync_backend": "nccl" if settings.engine == "vllm" else "gloo",  # the former asks for vLLM's version
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    words += ["--actor.adam.betas", *map(str, learner.betas), "--actor.eps_clip_low_high", "0.2", "0.2"]
    if settings.gradient_checkpointing:
        words.append("--actor.gradient_checkpointing_enable")
    arguments: SimpleNamespace = hierarchize(command_line().parse_args(words))
    arguments.train.colocate_all = settings.colocated
    # Not among the choices of the flag, which are of half precision.
    arguments.ds.param_dtype = settings.precision
    return arguments
