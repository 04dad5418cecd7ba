"""What `turnwise plan` and `turnwise doctor` are told, and what they show."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import orjson
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from turnwise.analysis.plan_tables import dialogues, estimated, memory, placement
from turnwise.environments.errors import InputError
from turnwise.environments.math_grader import MathGrader
from turnwise.protocols.graph import GraphProtocol
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.doctor import examine
from turnwise.rl.learner import LearnerSettings
from turnwise.rl.openrlhf.estimate import Assumptions, estimate
from turnwise.rl.openrlhf.placement import Machine
from turnwise.rl.openrlhf.plan import plan
from turnwise.rl.openrlhf.settings import OpenRLHFSettings
from turnwise.rl.trained_policy import Policy
from turnwise.rl.trainer import TrainingSettings
from turnwise.show import open_environment

ProtocolName = Literal["longshort", "thinkless"]


class JobSettings(BaseModel):
    """The tables of the file. `long_tokens` and `short_tokens` are the budgets of the protocol's turns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    long_tokens: PositiveInt = 1024
    short_tokens: PositiveInt = 512
    openrlhf: OpenRLHFSettings = OpenRLHFSettings()
    learner: LearnerSettings = LearnerSettings()
    training: TrainingSettings = TrainingSettings()
    machine: Machine = Machine()
    assumptions: Assumptions = Assumptions()


@dataclass(frozen=True, slots=True)
class Job:
    """A training run, as far as it can be told beforehand."""

    policies: dict[str, Policy]
    protocol: GraphProtocol
    settings: JobSettings


def read_job(policies: Sequence[str], seats: Sequence[str], protocol: ProtocolName, config: Path | None) -> Job:
    """From NAME=MODEL and NAME=seat,seat of each policy, whose seat is by default its name.

    Raises InputError for what cannot be read.
    """
    try:
        settings = JobSettings.model_validate({} if config is None else tomllib.loads(config.read_text()))
    except ValidationError as errors:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}; got {e['input']!r}" for e in errors.errors()]
        raise InputError("; ".join(faults)) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"--config must name a TOML file; {config} cannot be read: {error}") from None
    models, filled = _pairs("--policy", policies), _pairs("--seats", seats)
    if strange := [name for name in filled if name not in models]:
        raise InputError(f"--seats names policies of {list(models)}; got {strange}")
    long, short = settings.long_tokens, settings.short_tokens
    played: GraphProtocol = (
        LongShort(long_tokens=long, short_tokens=short)
        if protocol == "longshort"
        else Thinkless(think_tokens=long, short_tokens=short)
    )
    made = {
        name: Policy(model, tuple(filled.get(name, name).split(",")), settings.learner)
        for name, model in models.items()
    }
    return Job(made, played, settings)


def _pairs(flag: str, written: Sequence[str]) -> dict[str, str]:
    pairs = [one.partition("=") for one in written]
    if wrong := ["".join(pair) for pair in pairs if not all(pair)]:
        raise InputError(f"{flag} must be like NAME=...; got {wrong}")
    return {name: value for name, _, value in pairs}


def show_plan(job: Job, prompt_tokens: int, gpu_hour_price: float | None, *, as_json: bool = False) -> None:
    """Prints the plan and the estimate of a job. Raises InputError where it does not fit the machine."""
    settings = job.settings
    planned = plan(job.policies, settings.openrlhf, job.protocol, settings.machine, prompt_tokens=prompt_tokens)
    assumptions = settings.assumptions
    if gpu_hour_price is not None:
        assumptions = assumptions.model_copy(update={"gpu_hour_price": gpu_hour_price})
    found = estimate(
        planned, job.policies, settings.openrlhf, job.protocol, settings.training, assumptions,
        prompt_tokens=prompt_tokens,
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
    if planned.gpus:
        console.print(estimated(found))
    for note in (*planned.notes, *found.assumed):
        console.print(f"- {note}", markup=False, highlight=False)


def show_examination(job: Job, problems: str, *, as_json: bool = False) -> bool:
    """Prints what the doctor found; whether nothing is at fault."""
    with MathGrader(workers=1) as grader:
        environment = open_environment(problems, grader, number=64, seed=job.settings.training.seed)
        checks = examine(job.protocol, job.policies, environment, context=job.settings.openrlhf.context)
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
