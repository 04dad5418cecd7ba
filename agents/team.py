"""Who fills the seats, by the names of models: in this process, with vLLM, or with a server."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from rich.console import Console

from turnwise.agents.agent import Agent
from turnwise.environments.errors import InputError

if TYPE_CHECKING:
    import torch

EngineName = Literal["transformers", "vllm", "server"]
NO_VLLM = "vLLM is not installed: pip install 'turnwise[vllm]', or, on a CPU, make vllm, which puts it into .venv-vllm"


class Maker(Protocol):
    """Makes agents that share an engine."""

    def __call__(self, *, temperature: float, top_p: float = 1.0) -> Agent:
        """One that speaks at this temperature, within this nucleus."""


@contextmanager
def open_team(
    models: Mapping[str, str | Path],
    *,
    engine: EngineName = "transformers",
    temperature: float = 1.0,
    device: str = "cpu",
    urls: Sequence[str] = (),
    key_variable: str = "",
    cache_gigabytes: float = 1.0,
    context: int | None = None,
) -> Iterator[dict[str, Agent]]:
    """A token-exact agent for each seat, that speaks with its model: a checkpoint folder, or an id of the hub.

    Seats with the same model share one engine. `device` is for transformers; vLLM takes the GPU where there is one,
    and there `cache_gigabytes` beside the weights, for each model, whose `context` is else its own. Of a server, `urls`
    are the base URLs, "URL" where it serves all models, "SEAT=URL" where each has its own; several for a seat stand in
    for each other. Its key, if it wants one, is in the environment variable `key_variable`.

    Raises `InputError` for a model that cannot be loaded, URLs that name no seat, seats that have none, and an engine
    whose packages are not installed.
    """
    by_seat = _urls(tuple(models), urls) if engine == "server" else dict.fromkeys(models, tuple(urls))
    with ExitStack() as open_engines:
        makers: dict[tuple[str | Path, tuple[str, ...]], Maker] = {}
        for seat, model in models.items():
            if (model, by_seat[seat]) not in makers:
                makers[model, by_seat[seat]] = open_engines.enter_context(
                    open_engine(
                        model, engine, device=device, urls=by_seat[seat], key_variable=key_variable,
                        cache_gigabytes=cache_gigabytes, context=context,
                    )
                )  # fmt: skip
        yield {seat: makers[model, by_seat[seat]](temperature=temperature) for seat, model in models.items()}


@contextmanager
def open_engine(
    model: str | Path,
    engine: EngineName = "transformers",
    *,
    device: str = "cpu",
    urls: Sequence[str] = (),
    key_variable: str = "",
    cache_gigabytes: float = 1.0,
    context: int | None = None,
    dtype: "torch.dtype | None" = None,
    deadline: float = 1800.0,
) -> Iterator[Maker]:
    """What makes agents of one model. Else as `open_team`.

    `dtype` is by default float32 on a CPU, and the saved one on a GPU; a server has its own. `deadline` is how many
    seconds a server has to answer a turn.
    """
    if urls and engine != "server":
        raise InputError(f"URLs are for the engine 'server'; this one is {engine!r}: leave them out, or change it")
    with ExitStack() as open_engines:
        try:
            if engine == "transformers":
                maker = _transformers(model, device, dtype)
            elif engine == "vllm":
                maker = _vllm(model, cache_gigabytes, context, dtype, open_engines)
            else:
                maker = _server(model, urls, key_variable, deadline)
        except ModuleNotFoundError as error:
            if engine == "vllm":
                raise InputError(NO_VLLM) from error
            extra = "local" if engine == "transformers" else engine
            raise InputError(
                f"the engine {engine!r} needs the package {error.name}: pip install 'turnwise[{extra}]'"
            ) from error
        yield maker


# Each imports what only it needs.


def _transformers(model: str | Path, device: str, dtype: "torch.dtype | None") -> Maker:
    from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine

    return partial(TransformersAgent, TransformersEngine.load(model, device=device, dtype=dtype))


def _vllm(
    model: str | Path,
    cache_gigabytes: float,
    context: int | None,
    dtype: "torch.dtype | None",
    open_engines: ExitStack,
) -> Maker:
    from turnwise.agents.vllm_agent import VLLMAgent, VLLMEngine

    with Console(stderr=True).status(f"starting vLLM with {model}"):
        engine = VLLMEngine.load(model, cache_gigabytes=cache_gigabytes, context=context, dtype=dtype)
    open_engines.enter_context(engine)
    return partial(VLLMAgent, engine)


def _server(model: str | Path, urls: Sequence[str], key_variable: str, deadline: float) -> Maker:
    from turnwise.agents.server_agent import Server, TokenServerAgent
    from turnwise.agents.transformers_engine import checkpoint, load_tokenizer

    server = Server(urls, str(model), key_variable=key_variable, deadline=deadline)
    try:
        tokenizer = load_tokenizer(checkpoint(model))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"cannot load the tokenizer of {model} ({reason}): give its folder or hub id") from error
    return partial(TokenServerAgent, server, tokenizer)


def _urls(seats: tuple[str, ...], urls: Sequence[str]) -> dict[str, tuple[str, ...]]:
    named = [url.partition("=") if not url.startswith("http") else ("", "", url) for url in urls]
    if unknown := sorted({seat for seat, _, _ in named} - {"", *seats}):
        raise InputError(f"a URL must be like 'http://...' or 'SEAT=http://...'; {unknown} are no seats of {seats}")
    found = {seat: tuple(url for name, _, url in named if name in ("", seat)) for seat in seats}
    if without := [seat for seat in seats if not found[seat]]:
        raise InputError(f"each seat needs the base URL of a server; {without} have none: give URL or SEAT=URL")
    return found
