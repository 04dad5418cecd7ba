"""Tables of a plan, for the console: who is where, what each GPU holds, how long it may take."""

from itertools import groupby

from rich.table import Table

from turnwise.rl.openrlhf.estimate import Estimate
from turnwise.rl.openrlhf.plan import GPU, Plan


def placement(plan: Plan) -> Table:
    """One row a GPU, and one for the CPUs of each node: the processes on it, and its memory at the peak."""
    table = Table(title=f"{len(plan.gpus)} GPU(s)", title_justify="left")
    for heading in ("node", "GPU", "processes", "peak", "while", "usable"):
        table.add_column(heading, justify="right" if heading in ("node", "peak", "usable") else "left")
    usable = plan.machine.usable * plan.machine.gpu_gigabytes
    for gpu in plan.gpus:
        named = ", ".join(f"{one.policy} {one.role} {one.number}" for one in gpu.processes)
        table.add_row(str(gpu.node), str(gpu.number), named, _gb(gpu.peak), gpu.phase, f"{usable:.1f}")
    without = [one for one in plan.processes if one.gpu is None]
    for node, those in groupby(sorted(without, key=lambda one: one.node), key=lambda one: one.node):
        named = ", ".join(f"{one.policy} {one.role} {one.number}" for one in those)
        table.add_row(str(node), "CPU", named, "", "", "")
    return table


def memory(plan: Plan) -> Table:
    """One row for each part, in GB: a column for each kind of GPU and phase, GPUs that hold the same being one kind."""
    table = Table(title="GB on a GPU", title_justify="left")
    table.add_column("")
    kinds = list[list[GPU]]()
    for gpu in plan.gpus:
        same = (kind for kind in kinds if (kind[0].learning, kind[0].sampling) == (gpu.learning, gpu.sampling))
        if (kind := next(same, None)) is None:
            kinds.append(kind := [])
        kind.append(gpu)
    columns = []
    for kind in kinds:
        names = ", ".join(dict.fromkeys(one.policy for gpu in kind for one in gpu.processes))
        roles = "+".join(dict.fromkeys(one.role for one in kind[0].processes))
        phases = {"learning": kind[0].learning, "sampling": kind[0].sampling}
        if phases["learning"] == phases["sampling"]:
            phases = {"at all times": phases["learning"]}
        for phase, parts in phases.items():
            table.add_column(f"{len(kind)} × {roles} ({names})\n{phase}", justify="right")
            columns.append(parts)
    for name in dict.fromkeys(name for parts in columns for name, size in parts.items() if size):
        table.add_row(name, *(_gb(parts[name]) if parts.get(name) else "" for parts in columns))
    table.add_section()
    table.add_row("in all", *(_gb(sum(parts.values())) for parts in columns), style="bold")
    return table


def dialogues(plan: Plan) -> Table:
    """One row a policy: its parameters, its longest dialogue, and how many of these its engines' caches hold."""
    table = Table(title="Dialogues in the engines' caches", title_justify="left")
    for heading in ("policy", "parameters", "longest", "tokens a GB", "tokens in all", "longest at once"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for name, found in plan.dialogues.items():
        numbers = (found.longest, found.tokens_a_gigabyte, found.cache_tokens, found.at_once)
        table.add_row(name, f"{plan.shapes[name].parameters / 1e9:.3f} B", *(f"{number:,}" for number in numbers))
    return table


def estimated(estimate: Estimate) -> Table:
    """One row a policy: tokens and seconds of a step; then the whole run."""
    cost = "" if estimate.cost is None else f", {estimate.cost:,.0f} at the price given"
    title = (
        f"An estimate: {estimate.steps} steps of {estimate.step_seconds:,.0f} s, {estimate.hours:,.1f} h on "
        f"{estimate.gpus} GPU(s){cost}"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("policy", "tokens sampled", "read", "trained", "sampling", "learning"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for name, one in estimate.policies.items():
        tokens = (f"{number:,.0f}" for number in (one.sampled, one.read, one.trained))
        table.add_row(name, *tokens, f"{one.sampling_seconds:,.1f} s", f"{one.learning_seconds:,.1f} s")
    return table


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}"
