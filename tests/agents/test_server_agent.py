import asyncio
import contextlib
import email.utils
import itertools
import json
import logging
import math
import random
import re
import socket
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from turnwise.agents.agent import Agent
from turnwise.agents.server_agent import ChatServerAgent, Server, TokenServerAgent
from turnwise.environments.environment import Environment, Grade, Grader, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.seeds import turn_seed
from turnwise.environments.transcript import Message, Reply, Step, Transcript, Turn
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.solo import Solo
from turnwise.rl.episode_store import EpisodeStore
from turnwise.rl.rollout import play
from turnwise.rl.trajectory import trajectories

Json = dict[str, Any]
Answers = Callable[[Json, int], "Answer"]


@dataclass
class Answer:
    """What comes back: a body, or a fault."""

    body: Json | str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    fault: str = ""  # "truncated": half of the body; "reset": nothing at all; "hang": nothing, and no end


def error(status: int, message: str = "it failed", **headers: str) -> Answer:
    return Answer({"error": {"message": message}}, status, {name.replace("_", "-"): v for name, v in headers.items()})


def completion(request: Json, tokenizer: PreTrainedTokenizerFast, ids: list[int] | None = None) -> Answer:
    """Says what the seed has it say, and stops as vLLM does: by an id, by a string, or at the budget."""
    if ids is None:
        draw = random.Random(request["seed"])
        ids = tokenizer(f"so {draw.randrange(99)} it is, then</answer> and")["input_ids"]
    finish, reason, said = "length", None, ids[: request["max_tokens"]]
    for place in range(1, len(said) + 1):
        text = decoded(tokenizer, said[:place])
        found = [stop for stop in request["stop"] if stop in text]
        if said[place - 1] in [*request["stop_token_ids"], tokenizer.eos_token_id] or found:
            ended_by_eos = said[place - 1] == tokenizer.eos_token_id
            finish, reason = "stop", found[0] if found else None if ended_by_eos else said[place - 1]
            said = said[:place]
            break
    text = decoded(tokenizer, said)
    if isinstance(reason, str):
        text = text[: text.find(reason) + len(reason)]
    choice = {
        "index": 0, "text": text, "finish_reason": finish, "stop_reason": reason, "token_ids": said,
        "prompt_token_ids": request["prompt"], "logprobs": {"token_logprobs": [-n / 8 for n in range(len(said))]},
    }  # fmt: skip
    return Answer({"object": "text_completion", "choices": [choice]})


def chat(text: str, finish: str = "stop", stop_reason: str | None = None) -> Answer:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish, "stop_reason": stop_reason}
    return Answer({"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}})


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class FakeServer:
    """Answers completions by `answer(request, how many times the same was asked before)`, and records all it is asked.

    It can be killed, with all its connections, and started again at the same port.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, answer: Answers | None = None) -> None:
        self.tokenizer = tokenizer
        self.answer = answer or (lambda request, _: completion(request, tokenizer))
        self.context = 512
        self.detokenized: str | None = None
        self.processed = True  # whether log-probabilities are those of the tempered distribution
        self.likeliest = -2.5
        self.asked: list[tuple[str, Json]] = []
        self.headers: list[dict[str, str]] = []
        self.running = self.most_running = 0
        self.port = 0
        self._before: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._sockets: set[socket.socket] = set()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def turns(self) -> list[Json]:
        return [asked for path, asked in self.asked if path.endswith("completions") and asked.get("logprobs") != 1]

    def start(self) -> None:
        self._ended.clear()
        self._http = _Listening(self)
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self._thread.start()

    def kill(self) -> None:
        self._ended.set()
        self._http.shutdown()
        with self._lock:
            for connection in self._sockets:
                _shut(connection)
        self._http.server_close()  # waits for the threads of its connections
        self._thread.join()

    def respond(self, path: str, request: Json) -> Answer:
        if path == "/detokenize":
            return Answer({"prompt": self.detokenized or decoded(self.tokenizer, request["tokens"])})
        if path == "/tokenize":
            return Answer({"tokens": [5], "count": 1, "max_model_len": self.context})
        if request.get("logprobs") == 1:
            top = {" answer": self.likeliest * (request["temperature"] if self.processed else 1), " so": -3.0}
            first = {"text": "", "logprobs": {"token_logprobs": [-3.0], "top_logprobs": [top]}}
            return Answer({"choices": [first]})
        with self._lock:
            key = json.dumps(request)
            before = self._before[key]
            self._before[key] += 1
        return self.answer(request, before)


class _Listening(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 256

    def __init__(self, fake: FakeServer) -> None:
        self.fake = fake
        super().__init__(("127.0.0.1", fake.port), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is no news here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listening

    def setup(self) -> None:
        super().setup()
        with self.server.fake._lock:
            self.server.fake._sockets.add(self.connection)
        if self.server.fake._ended.is_set():
            _shut(self.connection)

    def finish(self) -> None:
        with self.server.fake._lock:
            self.server.fake._sockets.discard(self.connection)
        super().finish()

    def do_POST(self) -> None:
        fake = self.server.fake
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with fake._lock:
            fake.asked.append((self.path, request))
            fake.headers.append({name.lower(): value for name, value in self.headers.items()})
            fake.running += 1
            fake.most_running = max(fake.most_running, fake.running)
        try:
            answer = fake.respond(self.path, request)
        finally:
            with fake._lock:
                fake.running -= 1
        if answer.fault == "hang":
            fake._ended.wait()
        if answer.fault in ("hang", "reset"):
            self.close_connection = True
            _shut(self.connection)
            return
        body = (answer.body if isinstance(answer.body, str) else json.dumps(answer.body)).encode()
        self.send_response(answer.status)
        for name, value in {"content-type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if answer.fault == "truncated":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may have ended on its own
        connection.shutdown(socket.SHUT_RDWR)


KEY = "sk-planted-0123456789"
TAG = "</answer>"


@pytest.fixture
def started(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeServer]]:
    """Starts servers, and stops them after the test."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers: list[FakeServer] = []

    def start(answer: Answers | None = None) -> FakeServer:
        servers.append(FakeServer(tokenizer, answer))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def fake(started: Callable[..., FakeServer]) -> FakeServer:
    server: FakeServer = started()
    return server


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that turns have waited before they asked again, as they think: their clock is the sum of these."""
    seconds: list[float] = []
    sleep, ticks = asyncio.sleep, itertools.count()
    clock = SimpleNamespace(monotonic=lambda: sum(seconds) + next(ticks) * 1e-6, time=lambda: 1_000_000_000.5)

    async def recorded(delay: float) -> None:
        seconds.append(delay)
        await sleep(0)

    monkeypatch.setattr("turnwise.agents.server_connection.asyncio.sleep", recorded)
    monkeypatch.setattr("turnwise.agents.server_connection.time", clock)
    return seconds


def connected(*fakes: FakeServer, **settings: float | str) -> Server:
    """Quick to try again."""
    defaults: Json = {"timeout": 600.0, "deadline": 600.0, "backoff": 0.01, "rest": 0.05}
    return Server([fake.url for fake in fakes], "tiny", **{**defaults, **settings})


def turn(
    text: str = "what is 3 plus 4?", max_tokens: int = 40, stops: tuple[str, ...] = (TAG,), prefill: str = ""
) -> Turn:
    return Turn("seat", "state", (Message("user", text),), stops, max_tokens, prefill)


def ask(agent: Agent, asked: Turn | None = None, seed: int = 7) -> Reply:
    return asyncio.run(agent.reply(asked or turn(), seed))


def ask_all(agent: Agent, turns: Sequence[Turn]) -> list[Reply | BaseException]:
    async def run() -> list[Reply | BaseException]:
        replies = (agent.reply(asked, seed) for seed, asked in enumerate(turns))
        return await asyncio.gather(*replies, return_exceptions=True)

    return asyncio.run(run())


def always(answer: Answer) -> Answers:
    return lambda request, before: answer


def says(tokenizer: PreTrainedTokenizerFast, text: str) -> Answers:
    return lambda request, before: completion(request, tokenizer, tokenizer(text)["input_ids"])


def test_completion_is_asked_for_in_token_ids(fake: FakeServer, tokenizer: PreTrainedTokenizerFast) -> None:
    agent = TokenServerAgent(connected(fake), tokenizer, temperature=0.5, top_p=0.9)
    asked = turn(stops=("</think>", TAG), max_tokens=9)
    ask(agent, asked, seed=2**63 + 5)
    vocabulary = {"model": "tiny", "tokens": list(range(len(tokenizer)))}
    request = {
        "model": "tiny", "prompt": agent.template.prompt(asked), "max_tokens": 9, "temperature": 0.5, "top_p": 0.9,
        "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 5,
        "stop": ["</answer>"], "stop_token_ids": [tokenizer.convert_tokens_to_ids("</think>")],
        "include_stop_str_in_output": True, "skip_special_tokens": False, "spaces_between_special_tokens": False,
        "logprobs": 0, "return_token_ids": True,
    }  # fmt: skip
    likeliest = {
        "model": "tiny", "prompt": tokenizer("The")["input_ids"], "max_tokens": 1, "top_p": 1.0, "top_k": -1,
        "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0, "logprobs": 1,
    }  # fmt: skip
    assert fake.asked == [
        ("/detokenize", vocabulary),
        ("/v1/completions", {**likeliest, "temperature": 1.0}),
        ("/v1/completions", {**likeliest, "temperature": 0.5}),
        ("/tokenize", {"model": "tiny", "prompt": "."}),
        ("/v1/completions", request),
    ]
    ask(agent, asked, seed=5)
    assert fake.asked[5:] == [("/v1/completions", request)]


def test_reply_is_complete(fake: FakeServer, tokenizer: PreTrainedTokenizerFast) -> None:
    server = connected(fake, version=3)
    agent = TokenServerAgent(server, tokenizer, name="short")
    ids = tuple(tokenizer("so 41 it is, then</answer>")["input_ids"])
    expected = Reply(
        text="so 41 it is, then</answer>",
        token_count=len(ids),
        finish="stop",
        stop="</answer>",
        token_ids=ids,
        log_probabilities=tuple(-n / 8 for n in range(len(ids))),
        prompt_token_ids=tuple(agent.template.prompt(turn())),
        tokenizer=agent.template.fingerprint,
        model="short",
        version=3,
    )
    assert ask(agent) == expected
    server.version = 4
    assert ask(agent) == replace(expected, version=4)
    assert ask(TokenServerAgent(server, tokenizer)).model == "tiny"


@pytest.mark.parametrize(
    ("said", "max_tokens", "expected"),
    [
        ("so it is<|im_end|>", 40, ("so it is", "end", None, -1)),
        ("so it is<|im_end|>", 2, ("so it", "length", None, 2)),
        ("it </think> then</answer>", 40, ("it </think>", "stop", "</think>", -3)),
        ("so é</answer> and", 40, ("so é</answer>", "stop", "</answer>", -2)),
        ("<short> so", 1, ("<short>", "stop", "<short>", 1)),
        (" so", 1, (" so", "length", None, 1)),
    ],
)
def test_replies_are_read_from_their_ids(
    started: Callable[..., FakeServer],
    tokenizer: PreTrainedTokenizerFast,
    said: str,
    max_tokens: int,
    expected: tuple[str, str, str | None, int],
) -> None:
    agent = TokenServerAgent(connected(started(says(tokenizer, said))), tokenizer)
    stops = ("<short>", "<think>") if max_tokens == 1 else ("</think>", TAG)
    reply = ask(agent, turn(stops=stops, max_tokens=max_tokens))
    assert (reply.text, reply.finish, reply.stop) == expected[:3]
    if expected[3] > 0:
        assert reply.token_count == expected[3]
    assert decoded(tokenizer, list(reply.token_ids)) == reply.text + ("<|im_end|>" if reply.finish == "end" else "")


def test_a_tag_can_end_within_a_token(started: Callable[..., FakeServer], tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer(" answer")["input_ids"]) == 1
    fake = started(says(tokenizer, "so the answer is"))
    reply = ask(TokenServerAgent(connected(fake), tokenizer), turn(stops=("answ",)))
    assert (reply.text, reply.finish, reply.stop) == ("so the answer", "stop", "answ")


def test_characters_that_are_cut_are_no_fault(
    started: Callable[..., FakeServer], tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer("so 😀")["input_ids"][:-1]

    def held_back(request: Json, before: int) -> Answer:
        answer = completion(request, tokenizer, ids)
        assert isinstance(answer.body, dict)
        answer.body["choices"][0]["text"] = "so "
        return answer

    reply = ask(TokenServerAgent(connected(started(held_back)), tokenizer), turn(max_tokens=len(ids)))
    assert (reply.text, reply.token_ids) == ("so \N{REPLACEMENT CHARACTER}", tuple(ids))
    assert len(ids) == len(tokenizer("so")["input_ids"]) + 4


def test_a_space_that_only_one_decoder_begins_with_is_no_fault(
    started: Callable[..., FakeServer], tokenizer: PreTrainedTokenizerFast
) -> None:
    fake = started(tampered(tokenizer, text=" so 41 it is, then</answer>"))
    assert ask(TokenServerAgent(connected(fake), tokenizer)).text == "so 41 it is, then</answer>"


def test_earlier_replies_are_sent_as_their_ids(fake: FakeServer, tokenizer: PreTrainedTokenizerFast) -> None:
    agent = TokenServerAgent(connected(fake), tokenizer)
    first = ask(agent)
    messages = (*turn().messages, Message("assistant", first.text, first), Message("assistant", "<think>"))
    ask(agent, turn()._replace(messages=messages, prefill="so"))
    sent = first.prompt_token_ids + first.token_ids + agent.template.tokens("<think>") + agent.template.tokens("so")
    assert tuple(fake.turns[1]["prompt"]) == sent


def test_budget_is_cut_to_the_context(fake: FakeServer, tokenizer: PreTrainedTokenizerFast) -> None:
    agent = TokenServerAgent(connected(fake), tokenizer)
    length = len(agent.template.prompt(turn()))
    fake.context = length + 3
    reply = ask(agent)
    assert (reply.finish, reply.token_count, fake.turns[0]["max_tokens"]) == ("length", 3, 3)
    fake.context = length
    with pytest.raises(ValueError, match=f"from 1 to {length - 1} tokens; this one has {length}") as failure:
        ask(TokenServerAgent(connected(fake), tokenizer))
    assert not isinstance(failure.value, InputError)


def tampered(tokenizer: PreTrainedTokenizerFast, **changes: object) -> Answers:
    def answer(request: Json, before: int) -> Answer:
        fair = completion(request, tokenizer)
        assert isinstance(fair.body, dict)
        fair.body["choices"][0] |= changes
        return fair

    return answer


@pytest.mark.parametrize(
    "changes",
    [
        {"text": "so 42 it is, then</answer>"},
        {"text": "so 41 it is, then</ans"},
        {"text": "so 41 it is, then</answer> and so on"},
        {"text": ""},
        {"token_ids": [5, 6, 7]},
        {"logprobs": {"token_logprobs": [-0.5]}},
    ],
)
def test_ids_that_are_not_the_texts_are_named(
    started: Callable[..., FakeServer], tokenizer: PreTrainedTokenizerFast, changes: Json
) -> None:
    fake = started(tampered(tokenizer, **changes))
    with pytest.raises(ValueError, match="the token ids of a reply must be those of its text") as failure:
        ask(TokenServerAgent(connected(fake), tokenizer))
    assert not isinstance(failure.value, InputError)
    assert len(fake.turns) == 1


def test_more_ids_than_the_budget_are_named(
    started: Callable[..., FakeServer], tokenizer: PreTrainedTokenizerFast
) -> None:
    fake = started(lambda request, before: completion({**request, "max_tokens": 3}, tokenizer))
    assert ask(TokenServerAgent(connected(fake), tokenizer), turn(max_tokens=3)).token_count == 3
    with pytest.raises(ValueError, match=r"each with a log-probability, 2 at most; .* gave 3 ids"):
        ask(TokenServerAgent(connected(fake), tokenizer), turn(max_tokens=2))


def test_what_no_user_can_want_is_an_input_error(
    started: Callable[..., FakeServer], tokenizer: PreTrainedTokenizerFast
) -> None:
    def failure(fake: FakeServer, asked: Turn | None = None) -> str:
        with pytest.raises(InputError) as raised:
            ask(TokenServerAgent(connected(fake), tokenizer), asked)
        return str(raised.value)

    fake = started()
    fake.detokenized = decoded(tokenizer, [*range(1, len(tokenizer)), 0])
    assert failure(fake) == (
        f"the tokenizer must have the vocabulary of the served model; its {len(tokenizer)} tokens read otherwise at "
        f"{fake.url}: give load_tokenizer the folder or name of the model 'tiny'"
    )
    for changes in ({"token_ids": None}, {"logprobs": None}):
        fake = started(tampered(tokenizer, **changes))
        assert failure(fake) == (
            f"a token-exact server must return token ids and log-probabilities; {fake.url} does not: serve the model "
            "with vLLM 0.10.2 or later, or use ChatServerAgent"
        )
    assert failure(fake, turn(stops=("<short>", "<long>"), max_tokens=1)) == (
        "a control token must be one token of the vocabulary; ['<long>'] of seat 'seat' are not: call "
        "tokenizer.add_tokens(['<long>']) and model.resize_token_embeddings(len(tokenizer)), save both, and train the "
        "model to use them"
    )


def test_log_probabilities_of_another_distribution_are_refused(
    fake: FakeServer, tokenizer: PreTrainedTokenizerFast
) -> None:
    fake.processed = False
    for temperature, top_p in ((0.7, 1.0), (1.0, 0.9)):
        with pytest.raises(InputError) as failure:
            ask(TokenServerAgent(connected(fake), tokenizer, temperature=temperature, top_p=top_p))
        assert str(failure.value) == (
            "log-probabilities must be those of the distribution that is sampled from; with temperature="
            f"{temperature}, top_p={top_p} those of {fake.url} are not: start the server with --logprobs-mode "
            "processed_logprobs, or sample at temperature 1 and top_p 1"
        )
    for temperature in (0.0, 1.0):
        assert ask(TokenServerAgent(connected(fake), tokenizer, temperature=temperature)).stop == TAG
    fake.likeliest = -1e-4  # all but certain: so it would be at any temperature
    for temperature in (0.5, 1.5):
        assert ask(TokenServerAgent(connected(fake), tokenizer, temperature=temperature)).stop == TAG


def test_white_space_that_a_tokenizer_cleans_up_is_no_other_vocabulary(
    fake: FakeServer, tokenizer: PreTrainedTokenizerFast
) -> None:
    fake.detokenized = decoded(tokenizer, list(range(len(tokenizer)))).replace(" ", "")
    assert ask(TokenServerAgent(connected(fake), tokenizer)).stop == TAG


def test_chat_is_asked_for_in_messages(started: Callable[..., FakeServer]) -> None:
    fake = started(always(chat("so it is.")))
    agent = ChatServerAgent(connected(fake), top_p=0.9)
    messages = (
        Message("system", "be brief"), Message("user", "3 + 4?"), Message("assistant", "so"),
        Message("assistant", " 7"), Message("user", "sure?"),
    )  # fmt: skip
    reply = ask(agent, Turn("seat", "state", messages, (TAG,), 9))
    assert reply == Reply("so it is.", 7, "end", model="tiny")
    request = {
        "model": "tiny", "max_tokens": 9, "temperature": 1.0, "top_p": 0.9, "seed": 7,
        "messages": [
            {"role": "system", "content": "be brief"}, {"role": "user", "content": "3 + 4?"},
            {"role": "assistant", "content": "so 7"}, {"role": "user", "content": "sure?"},
        ],
    }  # fmt: skip
    assert fake.asked == [("/v1/chat/completions", request)]
    ask(ChatServerAgent(connected(fake), budget_field="max_completion_tokens"))
    assert "max_tokens" not in fake.turns[1]
    assert fake.turns[1]["max_completion_tokens"] == 40


def test_extended_chat_continues_messages_and_is_told_the_tags(started: Callable[..., FakeServer]) -> None:
    fake = started(always(chat(" it is", stop_reason=TAG)))
    agent = ChatServerAgent(connected(fake), extended=True)
    reply = ask(agent, turn(prefill="so"))
    assert reply == Reply(" it is</answer>", 7, "stop", TAG, model="tiny")
    assert fake.turns == [{
        "model": "tiny", "max_tokens": 40, "temperature": 1.0, "top_p": 1.0, "seed": 7,
        "messages": [{"role": "user", "content": "what is 3 plus 4?"}, {"role": "assistant", "content": "so"}],
        "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
        "stop": [TAG], "skip_special_tokens": False, "spaces_between_special_tokens": False,
        "add_generation_prompt": False, "continue_final_message": True,
    }]  # fmt: skip
    ask(agent)
    assert (fake.turns[1]["add_generation_prompt"], fake.turns[1]["continue_final_message"]) == (True, False)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (chat("so</answer> and</think>", "length"), ("so</answer>", "stop", TAG)),
        (chat("so it", "length"), ("so it", "length", None)),
        (chat("so it", "stop"), ("so it", "end", None)),
        (chat("so it", "length", TAG), ("so it", "length", None)),
        (chat("so it", "stop", "then"), ("so it", "end", None)),
    ],
)
def test_chat_is_cut_behind_the_first_tag(
    started: Callable[..., FakeServer], answer: Answer, expected: tuple[str, str, str | None]
) -> None:
    reply = ask(ChatServerAgent(connected(started(always(answer)))), turn(stops=("</think>", TAG)))
    assert (reply.text, reply.finish, reply.stop) == expected
    assert (reply.token_count, reply.token_ids, reply.log_probabilities) == (7, (), ())


def test_chat_says_what_it_cannot_do(started: Callable[..., FakeServer]) -> None:
    fake = started(always(Answer({"choices": [{"message": {"content": "so"}, "finish_reason": "stop"}]})))
    agent = ChatServerAgent(connected(fake))
    shared = turn()._replace(messages=(*turn().messages, Message("assistant", "so")))
    for asked in (turn(prefill="so"), shared):
        with pytest.raises(InputError) as raised:
            ask(agent, asked)
        assert str(raised.value) == (
            "a chat API begins each reply anew; the turn of seat 'seat' in state 'state' continues a message: use "
            "TokenServerAgent, or say extended=True to a server that takes continue_final_message"
        )
    with pytest.raises(InputError, match=r"must count the sampled tokens; http://127.* sends no usage"):
        ask(agent)


def test_chat_replies_are_refused_for_training(started: Callable[..., FakeServer]) -> None:
    agent = ChatServerAgent(connected(started(always(chat("so 7")))))
    episode = Episode(Transcript(PROBLEM, (Step("seat", "state", ask(agent)),)), 0, 0)
    with pytest.raises(InputError, match="by 'tiny', which gave 0 ids and 0 log-probabilities: fill the seat with a t"):
        trajectories(episode, "seat")


def after(faults: Sequence[Answer], tokenizer: PreTrainedTokenizerFast) -> Answers:
    """Fails so often, then answers."""
    return lambda request, before: faults[before] if before < len(faults) else completion(request, tokenizer)


PASSING = {
    "500": error(500), "503": error(503), "408": error(408), "409": error(409), "429": error(429),
    "hang": Answer(fault="hang"), "reset": Answer(fault="reset"), "truncated": Answer(" " * 99, fault="truncated"),
    "no JSON": Answer('{"choices": [{"te'), "a page": Answer("<html>", headers={"content-type": "text/html"}),
    "no choice": Answer({"choices": []}), "no text": Answer({"choices": [{"text": None}]}),
    "not finite": Answer('{"choices": [{"text": "", "logprobs": {"token_logprobs": [NaN]}}]}'),
    "aborted": Answer({"choices": [{"text": "", "finish_reason": "abort"}]}),
}  # fmt: skip


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_asked_again(
    started: Callable[..., FakeServer], tokenizer: PreTrainedTokenizerFast, fault: str
) -> None:
    fake = started(after([PASSING[fault]] * 2, tokenizer))
    reply = ask(TokenServerAgent(connected(fake, timeout=0.4 if fault == "hang" else 600), tokenizer))
    assert reply.text == "so 41 it is, then</answer>"
    assert len(fake.turns) == 3 or fault == "hang"  # where a busy machine may be late as well
    assert all(asked == fake.turns[0] for asked in fake.turns)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("500", "Error code: 500 - it failed"),
        ("429", "Error code: 429 - it failed"),
        ("hang", "no answer within 0.1 s"),
        ("reset", "Connection error. Server disconnected without sending a response."),
        ("truncated", "Connection error. peer closed connection without sending complete message body"),
        ("no JSON", "a malformed answer (JSON: Invalid JSON: EOF while parsing a string"),
        ("no choice", "a malformed answer (choices: List should have at least 1 item"),
        ("not finite", "a malformed answer (choices.0.logprobs.token_logprobs.0: Input should be a finite number)"),
        ("aborted", "the server ended the reply with 'abort'"),
    ],
)
def test_a_turn_fails_at_its_deadline_and_names_the_last_fault(
    started: Callable[..., FakeServer],
    tokenizer: PreTrainedTokenizerFast,
    slept: list[float],
    fault: str,
    said: str,
) -> None:
    fake = started(always(PASSING[fault]))
    server = connected(fake, timeout=0.1 if fault == "hang" else 600, deadline=60, backoff=30)
    with pytest.raises(TimeoutError) as failure:
        ask(TokenServerAgent(server, tokenizer))
    start = f"no server gave a usable answer within the deadline of 60 s; failure 3, at {fake.url}: "
    assert str(failure.value).startswith(start + said)
    draw = random.Random(7)
    assert slept == [30 * (0.5 + draw.random() / 2), 60 * (0.5 + draw.random() / 2)]


def test_a_hang_is_cut_at_the_deadline(started: Callable[..., FakeServer]) -> None:
    fake = started(always(Answer(fault="hang")))
    with pytest.raises(TimeoutError, match=r"deadline of 0\.3 s; failure 1, at .*: no answer within 0\.3 s"):
        ask(ChatServerAgent(connected(fake, deadline=0.3)))


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (400, ValueError, "{url} refuses the request: Error code: 400 - it failed"),
        (422, ValueError, "{url} refuses the request: Error code: 422 - it failed"),
        (401, InputError, "{url} needs a key that it accepts (Error code: 401 - it failed): name its variable as "
                          "key_variable"),
        (403, InputError, "{url} needs a key that it accepts (Error code: 403 - it failed): name its variable as "
                          "key_variable"),
        (404, InputError, "{url} must serve the model 'tiny', and for token ids also vLLM's /tokenize and /detokenize "
                          "(Error code: 404 - it failed): name a model that its /models lists, and a base URL that "
                          "ends as the server's does, most often in /v1"),
    ],
)  # fmt: skip
def test_what_does_not_pass_is_not_asked_again(
    started: Callable[..., FakeServer], status: int, kind: type[Exception], said: str
) -> None:
    fake = started(always(error(status, "it\nfailed")))
    with pytest.raises(kind) as failure:
        ask(ChatServerAgent(connected(fake)))
    assert type(failure.value) is kind
    assert str(failure.value) == said.format(url=fake.url)
    assert len(fake.turns) == 1


def test_other_ends_are_named(started: Callable[..., FakeServer]) -> None:
    fake = started(always(chat("so", "content_filter")))
    with pytest.raises(ValueError, match="must end with 'stop' or 'length'; the server ended it with 'content_filter'"):
        ask(ChatServerAgent(connected(fake)))
    assert len(fake.turns) == 1


def test_waits_double_and_the_seed_shortens_them(
    started: Callable[..., FakeServer], tokenizer: PreTrainedTokenizerFast, slept: list[float]
) -> None:
    agent = TokenServerAgent(connected(started(after([error(500)] * 9, tokenizer)), backoff=1, deadline=1e9), tokenizer)
    ask(agent, turn("one"), seed=7)
    draw = random.Random(7)
    assert slept == [wait * (0.5 + draw.random() / 2) for wait in (1, 2, 4, 8, 16, 32, 60, 60, 60)]
    ask(agent, turn("two"), seed=7)
    ask(agent, turn("three"), seed=8)
    assert slept[:9] == slept[9:18] != slept[18:]


@pytest.mark.parametrize(
    ("after", "wait"), [("0.6", 0.6), (email.utils.formatdate(1_000_000_002, usegmt=True), 1.5)], ids=["plain", "dated"]
)
def test_retry_after_is_honoured(
    started: Callable[..., FakeServer], tokenizer: PreTrainedTokenizerFast, slept: list[float], after: str, wait: float
) -> None:
    def busy(request: Json, before: int) -> Answer:
        return error(429, Retry_After=after) if before == 0 else completion(request, tokenizer)

    assert ask(TokenServerAgent(connected(started(busy)), tokenizer)).stop == TAG
    assert slept == [wait]


def test_a_retry_after_beyond_the_deadline_is_not_waited_for(
    started: Callable[..., FakeServer], slept: list[float]
) -> None:
    fake = started(always(error(429, Retry_After="3600")))
    with pytest.raises(TimeoutError, match="within the deadline of 20 s; failure 1"):
        ask(ChatServerAgent(connected(fake, deadline=20)))
    assert slept == []


@pytest.mark.parametrize("value", ["soon", "-5", "nan", ""])
def test_an_odd_retry_after_is_left_alone(
    started: Callable[..., FakeServer], tokenizer: PreTrainedTokenizerFast, value: str
) -> None:
    fake = started(after([error(429, Retry_After=value)], tokenizer))
    assert ask(TokenServerAgent(connected(fake), tokenizer)).stop == TAG


def test_no_more_turns_are_asked_for_at_once_than_allowed(
    started: Callable[..., FakeServer], tokenizer: PreTrainedTokenizerFast
) -> None:
    four = threading.Barrier(4)

    def together(request: Json, before: int) -> Answer:
        four.wait(600)
        return completion(request, tokenizer)

    fake = started(together)
    agent = TokenServerAgent(connected(fake, concurrency=4), tokenizer)
    replies = ask_all(agent, [turn(str(n)) for n in range(64)])
    assert all(isinstance(reply, Reply) for reply in replies)
    assert fake.most_running == 4
    assert [path for path, _ in fake.asked].count("/detokenize") == 1


def test_the_deadline_does_not_count_the_time_in_which_turns_wait_for_others(
    started: Callable[..., FakeServer], tokenizer: PreTrainedTokenizerFast, slept: list[float]
) -> None:
    def slowly(request: Json, before: int) -> Answer:
        slept.append(10)
        return completion(request, tokenizer) if before else error(500)

    agent = TokenServerAgent(connected(started(slowly), concurrency=1, deadline=60), tokenizer)
    replies = ask_all(agent, [turn(str(n)) for n in range(32)])
    assert all(isinstance(reply, Reply) for reply in replies)
    assert sum(slept) > 600


def test_dialogues_stay_at_one_url_and_leave_a_busy_one(
    started: Callable[..., FakeServer], tokenizer: PreTrainedTokenizerFast
) -> None:
    fakes = [started(), started()]
    agent = TokenServerAgent(connected(*fakes), tokenizer)
    for n in range(12):
        before = [len(fake.turns) for fake in fakes]
        first = ask(agent, turn(str(n)))
        more = (Message("assistant", first.text, first), Message("user", "and then?"))
        ask(agent, turn(str(n))._replace(messages=turn(str(n)).messages + more))
        assert sorted(len(fake.turns) - count for fake, count in zip(fakes, before, strict=True)) == [0, 2]
    assert all(fake.turns for fake in fakes)
    busy = TokenServerAgent(connected(*fakes, concurrency=1), tokenizer)
    before = [len(fake.turns) for fake in fakes]
    ask_all(busy, [turn("the same")] * 2)
    assert [len(fake.turns) - count for fake, count in zip(fakes, before, strict=True)] == [1, 1]


def test_a_dead_url_is_left_alone_for_a_while(
    started: Callable[..., FakeServer], tokenizer: PreTrainedTokenizerFast, slept: list[float]
) -> None:
    broken, well = started(always(error(500))), started()
    agent = TokenServerAgent(connected(broken, well, rest=60), tokenizer)
    replies = ask_all(agent, [turn(str(n)) for n in range(20)])
    assert all(isinstance(reply, Reply) for reply in replies)
    met = len(broken.turns)
    assert met > 0
    replies = ask_all(agent, [turn(str(n)) for n in range(20)])
    assert len(broken.turns) == met
    slept.append(61)
    broken.answer = well.answer
    ask_all(agent, [turn(str(n)) for n in range(20)])
    assert len(broken.turns) > met


def test_turns_that_wait_at_a_url_leave_it_when_it_fails(
    started: Callable[..., FakeServer], tokenizer: PreTrainedTokenizerFast
) -> None:
    broken, well = started(always(error(500))), started()
    agent = TokenServerAgent(connected(broken, well, concurrency=2, rest=6000), tokenizer)
    replies = ask_all(agent, [turn(str(n)) for n in range(40)])
    assert all(isinstance(reply, Reply) for reply in replies)
    assert len(broken.turns) == 2


def test_turns_at_urls_that_all_fail_wait(
    started: Callable[..., FakeServer], tokenizer: PreTrainedTokenizerFast, slept: list[float]
) -> None:
    fakes = [started(always(error(500))), started(always(error(500)))]
    with pytest.raises(TimeoutError, match="failure 4"):
        ask(TokenServerAgent(connected(*fakes, rest=1e-9, backoff=10, deadline=60), tokenizer))
    draw = random.Random(7)
    assert slept == [0, 20 * (0.5 + draw.random() / 2), 40 * (0.5 + draw.random() / 2)]


def test_of_urls_that_all_rest_the_first_to_wake_is_asked(
    started: Callable[..., FakeServer], tokenizer: PreTrainedTokenizerFast, slept: list[float]
) -> None:
    fakes = [started(always(error(500))), started(always(error(500)))]
    with pytest.raises(TimeoutError):
        ask(TokenServerAgent(connected(*fakes, rest=60, backoff=10, deadline=60), tokenizer))
    assert [len(fake.turns) for fake in fakes] == [2, 2]


def test_a_server_that_is_killed_and_started_again_serves_on(
    fake: FakeServer, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = TokenServerAgent(connected(fake), tokenizer)
    expected = ask(agent)
    fake.kill()
    sleep = asyncio.sleep

    async def while_it_starts(delay: float) -> None:
        if fake._ended.is_set():
            fake.start()
        await sleep(0)

    monkeypatch.setattr("turnwise.agents.server_connection.asyncio.sleep", while_it_starts)
    assert ask(agent) == expected


def test_one_event_loop_after_another_and_no_two_at_once(
    started: Callable[..., FakeServer], tokenizer: PreTrainedTokenizerFast
) -> None:
    asked, refused = threading.Event(), threading.Event()

    def slowly(request: Json, before: int) -> Answer:
        asked.set()
        refused.wait(600)
        return completion(request, tokenizer)

    agent = TokenServerAgent(connected(started(slowly)), tokenizer)
    other = threading.Thread(target=ask, args=(agent,))
    other.start()
    asked.wait()
    with pytest.raises(RuntimeError, match="from one event loop at a time; another one is using it now"):
        ask(agent)
    refused.set()
    other.join()
    assert ask(agent).stop == TAG


def test_a_cancelled_turn_leaves_no_connection(started: Callable[..., FakeServer]) -> None:
    async def run() -> None:
        loop, asked = asyncio.get_running_loop(), asyncio.Event()

        def hang(request: Json, before: int) -> Answer:
            loop.call_soon_threadsafe(asked.set)
            return Answer(fault="hang")

        agent = ChatServerAgent(connected(started(hang)))
        asking = asyncio.create_task(agent.reply(turn(), 0))
        await asked.wait()
        opened = agent.server._open
        assert opened
        (line,) = opened.lines
        assert not line.client.is_closed()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert line.client.is_closed()
        assert agent.server._open is None

    asyncio.run(run())


def test_bad_settings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    one_url = "a server needs base URLs, each of them once and like"
    for urls in ((), "127.0.0.1:8000", "http://me:secret@host/v1", "http://host/v1?key=secret", ["http://a"] * 2):
        with pytest.raises(InputError, match=one_url) as failure:
            Server(urls, "tiny")
        assert "secret" not in str(failure.value)
    settings: list[Json] = [{"concurrency": 0}, {"timeout": 0}, {"deadline": -1}, {"backoff": 0}, {"rest": 0}]
    for setting in settings:
        with pytest.raises(InputError, match="concurrency must be at least 1, and timeout, deadline, backoff and rest"):
            Server("http://host/v1", "tiny", **setting)
    for temperature, top_p in ((-1.0, 1.0), (math.nan, 1.0), (math.inf, 1.0), (1.0, 0.0), (1.0, 1.5), (1.0, math.nan)):
        with pytest.raises(InputError, match="temperature must be at least 0 and top_p within"):
            ChatServerAgent(Server("http://host/v1", "tiny"), temperature=temperature, top_p=top_p)
    monkeypatch.delenv("TURNWISE_KEY", raising=False)
    with pytest.raises(InputError) as failure:
        Server("http://host/v1", "tiny", key_variable="TURNWISE_KEY")
    assert str(failure.value) == (
        "a key must be one word of printable ASCII; the environment variable TURNWISE_KEY is not set: "
        "export TURNWISE_KEY=..."
    )
    monkeypatch.setenv("TURNWISE_KEY", f"{KEY}\nand more")
    with pytest.raises(InputError, match="TURNWISE_KEY is not that") as failure:
        Server("http://host/v1", "tiny", key_variable="TURNWISE_KEY")
    assert KEY not in str(failure.value)


def test_temperatures_that_vllm_takes_for_others_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    for temperature in (0.005, 3.0):
        with pytest.raises(InputError, match=r"for vLLM, temperature must be 0 or within \[0\.01, 2\]; got"):
            TokenServerAgent(Server("http://host/v1", "tiny"), tokenizer, temperature=temperature)


def test_a_url_that_fails_is_told_of_once(
    started: Callable[..., FakeServer], tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    fake = started(after([error(500, "not yet")] * 3, tokenizer))
    ask(TokenServerAgent(connected(fake), tokenizer))
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert re.fullmatch(rf"{fake.url}: .*not yet.*; each turn is asked for again for up to \d+ s", said)


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_a_key_is_sent_and_never_said(
    started: Callable[..., FakeServer],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("TURNWISE_KEY", f" {KEY}\n")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
    caplog.set_level(logging.DEBUG)
    fake = started(always(error(status, f"no such key: {KEY}")))
    server = connected(fake, key_variable="TURNWISE_KEY", deadline=20, backoff=60)
    with pytest.raises((ValueError, TimeoutError)) as failure:
        ask(ChatServerAgent(server))
    assert fake.headers[0]["authorization"] == f"Bearer {KEY}"
    assert "no such key: [the key]" in str(failure.value)
    shown = traceback.TracebackException.from_exception(failure.value, capture_locals=True)
    told = ["".join(shown.format()), repr(server), str(vars(server)), caplog.text, repr(failure.value.__context__)]
    assert "_lines" in told[0] or "ask" in told[0]
    assert not [text for text in told if KEY in text]
    with pytest.raises((ValueError, TimeoutError)):
        ask(ChatServerAgent(connected(fake, deadline=20, backoff=60)))
    assert fake.headers[-1]["authorization"] == "Bearer no-key-is-needed"


class Exact(Grader):
    async def grade(self, problem: Problem, text: str) -> Grade:
        return Grade(Outcome.RIGHT if problem.answer in text else Outcome.WRONG, text)


PROBLEM = Problem("p", "3 + 4?", "7")
PROBLEMS = Environment("many", [Problem(f"p{n}", f"{n} + 1?", str(n + 1)) for n in range(120)], Exact())


def test_hundreds_of_episodes_under_faults(
    started: Callable[..., FakeServer],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two URLs; what fails and how often is drawn from the turn's seed, and one URL is killed and started again."""
    monkeypatch.setenv("TURNWISE_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    def faulty(place: int, request: Json, before: int) -> Answer:
        draw = random.Random(f"{request['seed']} {before} {place}")
        fair = completion(request, tokenizer)
        assert isinstance(fair.body, dict)
        luck = draw.random()
        if request["seed"] % 50 == 0:
            fair.body["choices"][0]["text"] = f"the key is {before}"
        elif request["seed"] % 50 == 1:
            return error(400, f"too long for {KEY}")
        elif luck < 0.3:
            return error(500)
        elif luck < 0.33:
            return error(429, Retry_After="0.05")
        elif luck < 0.34:
            return Answer(fault="hang")
        elif luck < 0.37:
            return Answer(fault="reset")
        elif luck < 0.40:
            return Answer(fair.body, fault="truncated")
        elif luck < 0.43:
            return Answer('{"choices": [')
        return fair

    fakes = [started(partial(faulty, place)) for place in range(2)]
    server = connected(*fakes, key_variable="TURNWISE_KEY", concurrency=32, timeout=3.0, deadline=3000)
    agent = TokenServerAgent(server, tokenizer)
    seeds = {f"p{n}#{sample}": turn_seed(3, f"p{n}", sample, 0) for n in range(120) for sample in range(2)}
    expected = {id: seed % 50 for id, seed in seeds.items() if seed % 50 < 2}
    assert set(expected.values()) == {0, 1}

    def kill() -> None:
        while len(fakes[0].turns) < 50:
            time.sleep(0.01)
        fakes[0].kill()
        time.sleep(0.2)
        fakes[0].start()

    killing = threading.Thread(target=kill, daemon=True)
    killing.start()
    run = {"protocol": "solo"}
    with EpisodeStore(tmp_path / "run", run) as store:
        episodes = play(
            Solo("seat", stops=(TAG,), max_tokens=40), {"seat": agent}, PROBLEMS, samples=2, seed=3, store=store
        )
    killing.join()
    assert [episode.id for episode in episodes] == list(seeds)
    assert len((tmp_path / "run" / "episodes.jsonl").read_bytes().splitlines()) == 240
    failed = {episode.id: episode.error for episode in episodes if episode.error}
    assert failed.keys() == expected.keys()
    for id, error_named in failed.items():
        start = ("ValueError: the token ids of a reply must be", "ValueError: http://127.0.0.1:")[expected[id]]
        assert error_named.startswith(start)
    for episode in episodes:
        if episode.error is None:
            said = random.Random(seeds[episode.id]).randrange(99)
            assert episode.transcript.text == f"so {said} it is, then</answer>"
            assert len(trajectories(episode, "seat")) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert KEY not in caplog.text
    # What failed can be played again, in another event loop.
    for fake in fakes:
        fake.answer = lambda request, before: completion(request, tokenizer)
    with EpisodeStore(tmp_path / "run", run) as store:
        episodes = play(
            Solo("seat", stops=(TAG,), max_tokens=40), {"seat": agent}, PROBLEMS, samples=2, seed=3, store=store
        )
    assert [episode.id for episode in episodes] == list(seeds)
    assert not [episode for episode in episodes if episode.error]


def test_long_short_plays_and_trains_exactly(fake: FakeServer, tokenizer: PreTrainedTokenizerFast) -> None:
    lines = {"long": "<think>so it is</think>", "short": "<answer>so</answer>"}

    def answer(request: Json, before: int) -> Answer:
        seat = "long" if request["stop_token_ids"] else "short"
        return completion(request, tokenizer, tokenizer(lines[seat])["input_ids"])

    fake.answer = answer
    agent = TokenServerAgent(connected(fake), tokenizer)
    environment = Environment("four", PROBLEMS.problems[:4], Exact())
    fake.context = 2048
    for episode in play(LongShort(), {"long": agent, "short": agent}, environment):
        assert (episode.error, episode.transcript.text) == (None, lines["long"] + lines["short"])
        for seat in lines:
            (trajectory,) = trajectories(episode, seat)
            assert trajectory.sequence.trained == len(tokenizer(lines[seat])["input_ids"])
