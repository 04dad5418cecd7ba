"""The contract of engines, kept by vLLM in a process and by vLLM's server."""

import asyncio
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

from turnwise.agents.contract import CHECKS, Check, Subject
from turnwise.agents.team import open_engine
from turnwise.agents.tiny import LONG
from turnwise.agents.transformers_engine import load_tokenizer

pytest.importorskip("vllm", reason="needs vLLM: make vllm")

from turnwise.agents.vllm_server import VLLMServer

# What vLLM imports of torch says this.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.fixture(scope="module", params=["vllm", "server"])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    model = AutoModelForCausalLM.from_pretrained(LONG, dtype=torch.float32)

    def of(engine: str, *urls: str) -> Iterator[Subject]:
        with open_engine(LONG, engine, urls=urls, cache_gigabytes=0.064) as agent:  # type: ignore[arg-type]
            yield Subject(lambda t, p: agent(temperature=t, top_p=p), model, load_tokenizer(LONG), 1024)

    if request.param == "vllm":
        yield from of("vllm")
    else:
        with VLLMServer.start(LONG, cache_gigabytes=0.064) as server:
            yield from of("server", server.url)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_vllm_keeps_it(check: Check, subject: Subject) -> None:
    asyncio.run(check(subject))
