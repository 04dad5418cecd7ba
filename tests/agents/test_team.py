import asyncio
import sys
from pathlib import Path

import pytest

from turnwise.agents.server_agent import TokenServerAgent
from turnwise.agents.team import open_engine, open_team
from turnwise.agents.tiny import LONG, SHORT
from turnwise.agents.transformers_agent import TransformersAgent
from turnwise.environments.errors import InputError
from turnwise.environments.transcript import Message, Turn

FIRST, SECOND = "http://127.0.0.1:8000/v1", "http://127.0.0.1:8001/v1"
TURN = Turn("long", "think", (Message("user", "What is 3 + 4, modulo 10?"),), (), 5)


def test_each_seat_speaks_with_its_model_and_equal_models_are_one_engine() -> None:
    with open_team({"long": LONG, "short": SHORT, "checker": LONG}, temperature=0.5) as team:
        agents = {seat: agent for seat, agent in team.items() if isinstance(agent, TransformersAgent)}
        assert list(agents) == ["long", "short", "checker"]
        assert {agent.temperature for agent in agents.values()} == {0.5}
        assert agents["long"].engine is agents["checker"].engine
        replies = {seat: asyncio.run(agent.reply(TURN, 1)) for seat, agent in agents.items()}
    assert {seat: reply.model for seat, reply in replies.items()} == {
        "long": str(LONG), "short": str(SHORT), "checker": str(LONG)
    }  # fmt: skip
    assert replies["long"].token_ids == replies["checker"].token_ids
    assert replies["long"].log_probabilities != replies["short"].log_probabilities


@pytest.mark.parametrize(
    ("urls", "long", "short"),
    [
        ([FIRST], (FIRST,), (FIRST,)),
        ([f"long={FIRST}", f"short={SECOND}"], (FIRST,), (SECOND,)),
        ([FIRST, f"short={SECOND}"], (FIRST,), (FIRST, SECOND)),
    ],
)
def test_each_seat_has_its_servers(urls: list[str], long: tuple[str, ...], short: tuple[str, ...]) -> None:
    with open_team({"long": LONG, "short": SHORT}, engine="server", urls=urls) as team:
        agents = {seat: agent for seat, agent in team.items() if isinstance(agent, TokenServerAgent)}
        assert (agents["long"].server.urls, agents["short"].server.urls) == (long, short)
        assert agents["short"].server.model == agents["short"].name == str(SHORT)


def test_equal_models_at_other_servers_are_others() -> None:
    with open_team(
        {"a": LONG, "b": LONG, "c": LONG}, engine="server", urls=[f"a={FIRST}", f"b={SECOND}", f"c={FIRST}"]
    ) as team:
        servers = [agent.server for agent in team.values() if isinstance(agent, TokenServerAgent)]
    assert servers[0] is servers[2] is not servers[1]


def test_what_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, models: dict[str, str | Path], **settings: object) -> None:
        with pytest.raises(InputError, match=message) as failure, open_team(models, **settings):  # type: ignore[arg-type]
            pass
        assert "\n" not in str(failure.value)

    both: dict[str, str | Path] = {"long": LONG, "short": SHORT}
    refused(r"needs the base URL of a server; \['short'\] have none", both, engine="server", urls=[f"long={FIRST}"])
    refused(r"\['lang'\] are no seats of", both, engine="server", urls=[f"lang={FIRST}", FIRST])
    refused("URLs are for the engine 'server'; this one is 'transformers'", both, urls=[FIRST])
    refused("there is no folder", {"long": tmp_path / "missing"})
    refused("there is no folder", {"long": tmp_path / "missing"}, engine="server", urls=[FIRST])
    refused(
        r"cannot load the tokenizer of .* \(it holds no tokenizer\.json",
        {"long": tmp_path},
        engine="server",
        urls=[FIRST],
    )
    for module in ("turnwise.agents.server_agent", "turnwise.agents.server_connection"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "openai", None)
    refused(
        r"'server' needs the package openai: pip install 'turnwise\[server\]'$", both, engine="server", urls=[FIRST]
    )


def test_a_missing_package_within_the_run_is_not_the_engines() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package"), open_engine(LONG):
        import no_such_package  # type: ignore[import-not-found]  # noqa: F401
