"""Commands that look at what was played, and bring it in and out."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from turnwise.agents.team import EngineName
from turnwise.command import AsJson

app = typer.Typer()


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
    as_json: AsJson = False,
) -> None:
    """Shows runs side by side in one HTML file: figures, tables, and every conversation, token by token.

    The file holds all that it needs: it opens from disk, and no network is asked for anything.

    turnwise report runs/train_longshort

    turnwise report runs/before runs/after other/episodes.jsonl -o compare.html
    """
    from dataclasses import asdict

    import orjson
    from rich.console import Console

    from turnwise.show import report_shown

    written = report_shown(folders, output, tokenizer or (), Console(stderr=True))
    if as_json:
        typer.echo(orjson.dumps(asdict(written), default=str))
    else:
        runs = f"{written.runs} run{'' if written.runs == 1 else 's'}"
        typer.echo(f"{written.path}: {written.episodes:,} episodes of {runs}, {written.bytes / 1e6:.1f} MB")


@app.command("audit")
def audit(
    folder: Annotated[Path, typer.Argument(help="Of an episode store, or of a run that holds some.")],
    tokenizer: Annotated[Path | None, typer.Option(help="The folder of the run's tokenizer.")] = None,
    as_json: AsJson = False,
) -> None:
    """Proves that what trains is exactly what was sampled, in each episode store in FOLDER. Exit code 1: it is not.

    turnwise audit runs/first --tokenizer agents/tiny/long

    With the tokenizer, it also proves that nothing was tokenised a second time.
    """
    from turnwise.analysis.audit import main

    main(folder, tokenizer, as_json=as_json)


@app.command("contribution")
def tell_contribution(
    run: Annotated[Path, typer.Argument(help="The folder of a run's episodes, or one that holds a single run.")],
    protocol: Annotated[str, typer.Option(help="The run's own: its name, or FILE.py:NAME.")] = "longshort",
    seat: Annotated[list[str] | None, typer.Option(help="Whose contribution; by default each seat's.")] = None,
    instead: Annotated[
        str,
        typer.Option("--with", help="Who is in the seat instead: ablated (nobody), or who --model could name."),
    ] = "ablated",
    says: Annotated[str, typer.Option(help='What an ablated seat says, such as "<think></think>".')] = "",
    model: Annotated[
        list[str] | None, typer.Option(help="SEAT=MODEL, as play's --seat; by default as run.json says.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="The run's budget of each turn, if not the protocol's.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="By default the run's, or else 1.")] = None,
    engine: Annotated[EngineName, typer.Option(help="What samples: transformers, vllm, or server.")] = "transformers",
    url: Annotated[
        list[str] | None, typer.Option(help="A server's base URL, or SEAT=URL; --with's is with=URL.")
    ] = None,
    key_variable: Annotated[str, typer.Option(help="The environment variable that holds the server's key.")] = "",
    device: Annotated[str, typer.Option(help="Of transformers.")] = "cpu",
    cache_gigabytes: Annotated[float, typer.Option(help="What each vLLM engine takes beside its weights.")] = 1.0,
    context: Annotated[int | None, typer.Option(help="Of vLLM; else the model's own.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for what is played; a stopped command goes on there. RUN-contribution.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tells who mattered: plays a run again with one seat silent or filled by another model.

    Only what the change can reach is played. Prints accuracy and tokens with and without the seat, 95% intervals of
    the differences over problems, and an alarm for a lazy seat.

    turnwise contribution runs/both --seat long --with ablated --says "<think></think>"

    turnwise contribution runs/first/long⊗short --max-tokens 512 --seat long --with tiny-novice
    """
    from dataclasses import asdict

    import orjson
    from rich.console import Console

    from turnwise.analysis.contribution import ABLATED, ablated
    from turnwise.analysis.tables import contributions
    from turnwise.environments.errors import InputError
    from turnwise.named import Sampling, models_of, open_protocol, seated, store_in, stored_episodes
    from turnwise.rl.run_folder import read_run
    from turnwise.show import contribution_shown, open_grader

    played_by = open_protocol(protocol, max_tokens=max_tokens)
    store = store_in(run)
    episodes, described = stored_episodes(store), read_run(store)
    known = str(described.get("protocol", ""))
    # Its last word is the hash; the class before it is another where budgets were set. A training run pays a reward of
    # its own, which no name here has.
    if known and "step" not in described and known.split()[-1] != played_by.fingerprint.split()[-1]:
        raise InputError(
            f"{store} was played by {known}, and {protocol} with these budgets is {played_by.fingerprint}: give the "
            "run's own --protocol and --max-tokens"
        )
    seats = seat or list(played_by.seats)
    silent = instead == ABLATED
    # A lone silent seat needs no model.
    needed = [other for other in played_by.seats if seats != [other]]
    models = models_of(needed, model or (), described) | ({} if silent else {"with": instead})
    heat = float(described.get("temperature", 1)) if temperature is None else temperature
    sampling = Sampling(engine, heat, device, tuple(url or ()), key_variable, cache_gigabytes, context)
    settings = {f"seat {other}": who for other, who in models.items()} | {"engine": engine, "temperature": heat}
    folder = output or run.resolve().with_name(f"{run.resolve().name}-contribution")
    with open_grader(str(described.get("answer_marker", "")) or None) as grader, seated(models, sampling) as team:
        in_seat = ablated(says) if silent else team.pop("with")
        name = f"{ABLATED} {says}".strip() if silent else instead
        found = [
            contribution_shown(
                played_by, team, grader, episodes, one, (name, in_seat), Console(stderr=True),
                folder=folder, run=described, settings=settings,
            )
            for one in seats
        ]  # fmt: skip
    if as_json:
        typer.echo(orjson.dumps([{**asdict(one), "alarms": one.alarms} for one in found], option=orjson.OPT_INDENT_2))
        return
    console = Console()
    title = f"{found[0].episodes} episodes of {run.name}, with {name} in each seat"
    console.print(contributions(found, title=title))
    for alarm in (alarm for one in found for alarm in one.alarms):
        console.print(alarm, style="yellow", markup=False, highlight=False, soft_wrap=True)


@app.command()
def control(
    run: Annotated[Path, typer.Argument(help="The folder of a team's episodes.")],
    alone: Annotated[Path, typer.Option(help="That of a lone agent's on the same problems, several samples of each.")],
    plot: Annotated[Path | None, typer.Option(help="Write accuracy over tokens to this PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Holds a team against a lone agent with the same tokens, reckoned from stored samples.

    The lone agent is cut short where its tokens are those of the team, or votes (self-consistency) as often as they
    allow. Intervals of 95% are over problems.

    turnwise control runs/first/long⊗short --alone runs/first/long-alone --plot control.png
    """
    from dataclasses import asdict

    import orjson
    from rich.console import Console

    from turnwise.analysis.control import at_all_budgets
    from turnwise.analysis.tables import equal_tokens
    from turnwise.named import stored_episodes

    found = at_all_budgets(stored_episodes(run), stored_episodes(alone))
    if plot is not None:
        from turnwise.analysis.plots import accuracy_over_budgets
        from turnwise.show import write_png

        title = f"{found.problems} problems, {alone.name} against {run.name}"
        figure = accuracy_over_budgets(found, team=run.name, title=title)
        write_png(plot, lambda draft: figure.savefig(draft, format="png"))
    if as_json:
        typer.echo(orjson.dumps(asdict(found), option=orjson.OPT_NON_STR_KEYS | orjson.OPT_INDENT_2))
        return
    held = {f"{alone.name}, {name}": one for name, one in found.same_tokens.items()}
    gains = {f"{alone.name}, {name}": gain for name, gain in found.gains.items()}
    Console().print(equal_tokens({run.name: found.team, **held}, gains))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run's episodes, or one that holds a single run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write; of Inspect's it ends in .json.")],
    to: Annotated[Literal["inspect", "parquet"], typer.Option(help="A log of Inspect's, or a Parquet file.")],
) -> None:
    """Writes a run's episodes as a log for inspect view, or as a Parquet file for pandas, DuckDB and the like.

    turnwise export runs/both --to inspect -o logs/both.json && inspect view --log-dir logs
    """
    from turnwise.named import store_in

    store = store_in(run)
    if to == "inspect":
        from turnwise.analysis.inspect_log import export_inspect

        number = export_inspect(store, output)
    else:
        from turnwise.rl.parquet import export_parquet

        number = export_parquet(store, output)
    typer.echo(f"{number} episodes are in {output}")


@app.command("import-chats")
def read_chats(
    file: Annotated[Path, typer.Argument(help='JSONL, a chat a line: {"messages": [{"role", "content"}]}.')],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the run that they become.")],
    messages_column: Annotated[str, typer.Option(help="Where a line has the chat.")] = "messages",
    answer_column: Annotated[str, typer.Option(help="Where a line has the gold answer, if it does.")] = "answer",
    problem_column: Annotated[
        str, typer.Option(help="Where it has the problem; else what comes first is.")
    ] = "problem",
    id_column: Annotated[str, typer.Option(help="Where it has the problem's id; else one is made up.")] = "id",
    marker: Annotated[
        str, typer.Option(help='What the answer stands behind, such as "####"; by default it is in a box.')
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Reads chat logs into a run's folder for analysis, and grades those that have a gold answer.

    turnwise import-chats chats.jsonl -o runs/chats --answer-column gold --marker "####"
    """
    from dataclasses import asdict
    from functools import partial

    import orjson

    from turnwise.analysis.chat_logs import ChatColumns, import_chats
    from turnwise.environments.answers import last_boxed, last_marked
    from turnwise.environments.math_grader import MathGrader

    columns = ChatColumns(messages=messages_column, id=id_column, problem=problem_column, answer=answer_column)
    with MathGrader(extract=partial(last_marked, marker=marker) if marker else last_boxed) as grader:
        found = import_chats(file, output, grader, columns=columns)
    told = f"{found.chats} chats are in {output}; {found.graded} graded, {found.right} of them right"
    typer.echo(orjson.dumps(asdict(found)) if as_json else told)
