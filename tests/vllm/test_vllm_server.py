"""vLLM's own server on the shipped tiny models, as it is and behind a proxy that has its answers fail."""

import asyncio
import contextlib
import http.client
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from turnwise.agents.server_agent import Server, TokenServerAgent
from turnwise.agents.tiny import LONG, SHORT
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.agents.transformers_engine import load_tokenizer
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.environment import Grade, Grader, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.seeds import turn_seed
from turnwise.environments.transcript import Message, Reply, Turn
from turnwise.protocols.long_short import LongShort
from turnwise.rl.episode_store import EpisodeStore
from turnwise.rl.rollout import play
from turnwise.rl.trajectory import trajectories

pytest.importorskip("vllm", reason="needs vLLM: make vllm")

import psutil

from turnwise.agents.vllm_server import VLLMServer, main

# What vLLM imports of torch says this.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

Json = dict[str, Any]
KEY = "sk-planted-0123456789"
MODELS = {"long": LONG, "short": SHORT}


@dataclass
class Started:
    """Two servers that ask for a key, and how those that cannot serve came to an end.

    The first is a `VLLMServer`, the second what the command line starts.
    """

    long: VLLMServer
    command: "subprocess.Popen[str]"
    urls: dict[str, str]
    failures: dict[str, "Future[VLLMServer]"]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """All at once, since each takes half a minute."""
    weightless = tmp_path_factory.mktemp("weightless")
    for file in LONG.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, weightless)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(3) as pool:
        for name, value in {"VLLM_API_KEY": KEY, "TURNWISE_KEY": KEY, "NO_PROXY": "127.0.0.1"}.items():
            patch.setenv(name, value)
        command = subprocess.Popen(
            [sys.executable, "-m", "turnwise.agents.vllm_server", str(SHORT), "--port", "0"],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            starting = pool.submit(VLLMServer.start, LONG, cache_gigabytes=0.2)
            failures = {
                "no weights": pool.submit(VLLMServer.start, weightless),
                "too long": pool.submit(VLLMServer.start, LONG, context=100_000),
                "no tokenizer": pool.submit(VLLMServer.start, LONG.parent),
                "no batch": pool.submit(VLLMServer.start, LONG, max_running=0),
            }
            assert command.stdout is not None
            line = command.stdout.readline()
            with starting.result() as long:
                yield Started(long, command, {"long": long.url, "short": line.split()[-1]}, failures)
        finally:
            command.send_signal(signal.SIGINT)
            command.communicate(timeout=600)


def processes(group: int) -> list[psutil.Process]:
    """Those of a session that have not ended."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def ends(group: int, within: float = 600.0) -> bool:
    """Whether a session has ended, or does so `within` so many seconds."""
    until = time.monotonic() + within
    while processes(group) and time.monotonic() < until:
        time.sleep(0.05)
    return not processes(group)


def team(urls: Mapping[str, str], temperature: float = 0.0, **settings: float) -> dict[str, TokenServerAgent]:
    return {
        seat: TokenServerAgent(
            Server(url, str(MODELS[seat]), key_variable="TURNWISE_KEY", **settings), load_tokenizer(MODELS[seat]),
            temperature=temperature, name=seat,
        )
        for seat, url in urls.items()
    }  # fmt: skip


def assert_alike(replies: Sequence[Reply], expected: Sequence[Reply]) -> None:
    """Equal in all but the last bits of the log-probabilities."""
    for reply, other in zip(replies, expected, strict=True):
        assert (reply.text, reply.finish, reply.stop) == (other.text, other.finish, other.stop)
        assert (reply.prompt_token_ids, reply.token_ids) == (other.prompt_token_ids, other.token_ids)
        assert (reply.token_count, reply.tokenizer) == (other.token_count, other.tokenizer)
        assert reply.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-3)


def said(episode: Episode) -> list[Reply]:
    return [step.reply for step in episode.transcript.steps]


class Exact(Grader):
    async def grade(self, problem: Problem, text: str) -> Grade:
        return Grade(Outcome.RIGHT if f"{{{problem.answer}}}" in text else Outcome.WRONG, text)


def test_two_servers_play_greedily_what_transformers_plays(started: Started) -> None:
    expected_team = {
        seat: TransformersAgent(TransformersEngine.load(path), temperature=0) for seat, path in MODELS.items()
    }
    environment = arithmetic(Exact(), problem_set="mixed", count=32, seed=11)
    episodes = play(LongShort(), team(started.urls), environment, seed=3)
    expected = play(LongShort(), expected_team, environment, seed=3)
    assert not [episode.error for episode in episodes if episode.error]
    for episode, other in zip(episodes, expected, strict=True):
        assert len(said(episode)) >= 2
        assert_alike(said(episode), said(other))


def test_the_example_plays_the_same_with_every_engine(started: Started, tmp_path: Path) -> None:
    """As a user runs it: in processes of their own, with what vLLM says kept from what the example prints."""
    example = Path(__file__).parents[2] / "examples" / "longshort_math.py"
    urls = [f"--url={seat}={url}" for seat, url in started.urls.items()]
    more = {
        "transformers": [],
        "vllm": ["--cache-gigabytes", "0.2", "--context", "1024"],
        "server": [*urls, "--key-variable", "TURNWISE_KEY"],
    }
    runs = {
        engine: subprocess.run(
            [sys.executable, example, "--engine", engine, "--temperature", "0", "--number", "6", "--shown", "1",
             "--output", tmp_path / engine, *flags],
            capture_output=True, text=True, timeout=3000, check=False,
        )
        for engine, flags in more.items()
    }  # fmt: skip
    assert [run.returncode for run in runs.values()] == [0, 0, 0], [run.stderr for run in runs.values()]
    assert runs["transformers"].stdout == runs["vllm"].stdout == runs["server"].stdout
    assert "long⊗short" in runs["vllm"].stdout


class Proxy:
    """Passes requests on to a server, or has them fail, as `fault` says of each and of how often it came before."""

    def __init__(self, url: str, fault: Callable[[Json, int], str]) -> None:
        self.upstream = str(urlsplit(url).netloc)
        self.fault = fault
        self.faults: Counter[str] = Counter()
        self.before: Counter[bytes] = Counter()
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self._http = _Listening(self)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))

    def __enter__(self) -> "Proxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._http.shutdown()
        self._http.server_close()  # waits for the threads of its connections
        self._thread.join()

    def draw(self, body: bytes) -> str:
        request = json.loads(body)
        if not request.get("return_token_ids"):
            return ""  # it is no turn
        with self.lock:
            before = self.before[body]
            self.before[body] += 1
        return self.fault(request, before)

    def count(self, fault: str) -> None:
        with self.lock:
            self.faults[fault] += 1


class _Listening(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 256

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that has gone is no news here
            self.proxy.count("of the proxy itself")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 0.5  # so that idle connections do not outlive the proxy
    server: _Listening

    def do_POST(self) -> None:
        proxy, key = self.server.proxy, self.headers["authorization"]
        body = self.rfile.read(int(self.headers["content-length"]))
        fault = proxy.draw(body)
        if fault == "hang":
            proxy.ended.wait(60)
        elif fault in ("500", "429", "400"):
            told = json.dumps({"error": {"message": f"it failed for {key}"}}).encode()
            self.answer(int(fault), told, {"retry-after": "0.2"} if fault == "429" else {})
        elif fault != "reset":
            try:
                status, told = self.passed_on(body, key)
            except (OSError, http.client.HTTPException):
                fault = "server is gone"
            else:
                self.answer(status, spoiled(told, fault, json.loads(body)), cut=fault == "truncated")
        proxy.count(fault)
        if fault in ("hang", "reset", "server is gone"):
            self.reset()

    def passed_on(self, body: bytes, key: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.server.proxy.upstream, timeout=60)
        with contextlib.closing(connection):
            connection.request("POST", self.path, body, {"content-type": "application/json", "authorization": key})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def answer(self, status: int, body: bytes, headers: Mapping[str, str] = {}, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection |= cut

    def reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, *_: object) -> None:
        pass


def spoiled(told: bytes, fault: str, request: Json) -> bytes:
    if fault == "no JSON":
        return told[: len(told) // 2]
    if fault == "other ids":
        answer = json.loads(told)
        choice = answer["choices"][0]
        choice["token_ids"] = request["prompt"][: len(choice["token_ids"])]
        return json.dumps(answer).encode()
    return told


# The share of each in the answers. It is drawn anew each time that the same is asked for.
PASSING = {"500": 0.3, "429": 0.03, "hang": 0.004, "reset": 0.03, "truncated": 0.03, "no JSON": 0.03}
LASTING = {0: "other ids", 1: "400"}
"""By the seed of a turn, modulo 100: what happens to it each time."""
NAMED = {"other ids": "ValueError: the token ids of a reply must be those of its text", "400": "ValueError: http://127"}


def faulty(request: Json, before: int) -> str:
    if lasting := LASTING.get(request["seed"] % 100):
        return lasting
    luck = random.Random(f"{request['seed']} {before}").random()
    for fault, share in PASSING.items():
        luck -= share
        if luck < 0:
            return fault
    return ""


def lasting(episode: Episode) -> tuple[int, str] | None:
    """The first turn of an undisturbed episode that does not pass `faulty`, and why."""
    for place in range(len(said(episode))):
        seed = turn_seed(episode.seed, episode.transcript.problem.id, episode.sample, place)
        if seed % 100 in LASTING:
            return place, LASTING[seed % 100]
    return None


def killed_and_started_again(server: VLLMServer, proxy: Proxy) -> None:
    """Once a good part of the run is over."""
    while proxy.faults[""] < 400:
        time.sleep(0.01)
    server.kill()
    server.restart()


def test_a_thousand_episodes_under_faults(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What fails and how often is drawn from the turn's seed, and one server is killed and started again."""
    monkeypatch.setattr("turnwise.agents.server_connection.LONGEST_BACKOFF", 2.0)
    environment = arithmetic(Exact(), problem_set="easy", count=500, seed=5)
    protocol, run = LongShort(long_tokens=40, short_tokens=40), {"protocol": "long-short"}
    undisturbed = play(protocol, team(started.urls, temperature=0.9), environment, samples=2, seed=3)
    expected = {episode.id: found for episode in undisturbed if (found := lasting(episode))}
    assert len(undisturbed) == 1000
    assert not [episode.error for episode in undisturbed if episode.error]
    assert {fault for _, fault in expected.values()} == set(NAMED)

    caplog.set_level(logging.DEBUG)
    with contextlib.ExitStack() as open_proxies:
        proxies = {seat: open_proxies.enter_context(Proxy(url, faulty)) for seat, url in started.urls.items()}
        urls = {seat: proxy.url for seat, proxy in proxies.items()}
        killing = threading.Thread(target=killed_and_started_again, args=(started.long, proxies["long"]), daemon=True)
        killing.start()
        with EpisodeStore(tmp_path / "run", run) as store:
            agents = team(urls, temperature=0.9, timeout=8.0, deadline=3000, rest=0.05)
            episodes = play(protocol, agents, environment, samples=2, seed=3, store=store)
        killing.join()
    faults = sum((proxy.faults for proxy in proxies.values()), Counter())
    assert faults.keys() == {"", *PASSING, *LASTING.values(), "server is gone"}
    assert 0.25 < faults["500"] / faults.total() < 0.4

    assert [episode.id for episode in episodes] == [episode.id for episode in undisturbed]
    assert len((tmp_path / "run" / "episodes.jsonl").read_bytes().splitlines()) == 1000
    assert {episode.id for episode in episodes if episode.error} == expected.keys()
    for episode, other in zip(episodes, undisturbed, strict=True):
        place, fault = expected.get(episode.id, (None, None))
        assert_alike(said(episode), said(other)[:place])
        if fault is None:
            assert episode.grade == other.grade
            assert trajectories(episode, "long")
        else:
            assert str(episode.error).startswith(NAMED[fault])
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert "it failed for Bearer [the key]" in (tmp_path / "run" / "episodes.jsonl").read_text()
    assert KEY not in caplog.text

    # What failed is played again, and nothing else.
    with EpisodeStore(tmp_path / "run", run) as store:
        episodes = play(protocol, team(started.urls, temperature=0.9), environment, samples=2, seed=3, store=store)
    assert len((tmp_path / "run" / "episodes.jsonl").read_bytes().splitlines()) == 1000 + len(expected)
    for episode, other in zip(episodes, undisturbed, strict=True):
        assert episode.error is None
        assert_alike(said(episode), said(other))


def test_the_key_is_asked_for(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNWISE_KEY", "sk-another")
    turn = Turn("long", "state", (Message("user", "3 + 4?"),), (), 1)
    with pytest.raises(InputError, match=r"needs a key that it accepts .*: set TURNWISE_KEY to one"):
        asyncio.run(team(started.urls)["long"].reply(turn, 0))


def test_what_cannot_be_served_is_named(started: Started, capsys: pytest.CaptureFixture[str]) -> None:
    folder = "give the folder that save_pretrained wrote"
    for fault, message in (
        (
            "no weights",
            rf"cannot serve .*weightless0 with vLLM \(RuntimeError: Cannot find any model weights .*\): {folder}",
        ),
        ("too long", rf"cannot serve .*long with vLLM \(.*max_model_len \(100000\) is greater than .*\): {folder}"),
        ("no tokenizer", rf"cannot serve .* with vLLM \(ValueError: it holds no tokenizer\.json; .*\): {folder}"),
        (
            "no batch",
            r"max_running must be at least 1 and cache_gigabytes a number above 0; got max_running=0, cache.*=1\.0$",
        ),
    ):
        with pytest.raises(InputError) as failure:
            started.failures[fault].result()
        assert re.match(message, str(failure.value))
        assert "\n" not in str(failure.value)
        assert len(str(failure.value)) < 900
    taken = urlsplit(started.urls["short"]).port
    with pytest.raises(InputError, match=rf"and a free port; 127\.0\.0\.1:{taken} is not \(.*\): choose"):
        VLLMServer.start(LONG, port=taken or 0)
    with pytest.raises(InputError, match=r"a port must be within \[0, 65535\]; got 99999"):
        VLLMServer.start(LONG, port=99999)
    with pytest.raises(InputError, match=r"an IPv4 address of this machine and a free port; nowhere\.invalid:0 is not"):
        VLLMServer.start(LONG, host="nowhere.invalid")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InputError, match="a server needs an IPv4 address of this machine and a free port"):
        main(str(LONG), port=taken or 0)
    signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().out == ""


def test_the_end_is_named_and_leaves_no_process(started: Started) -> None:
    """Last of all, since it ends the servers."""
    assert started.long._process is not None
    group = started.long._process.pid
    assert len(processes(group)) >= 2
    os.kill(group, signal.SIGKILL)
    with pytest.raises(InputError, match=r"cannot serve .*long with vLLM \("):
        started.long.wait()
    started.long.close()
    assert ends(group)
    started.long.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", urlsplit(started.long.url).port or 0))

    (server,) = psutil.Process(started.command.pid).children()
    assert len(processes(server.pid)) >= 2
    started.command.send_signal(signal.SIGTERM)
    assert started.command.wait(timeout=600) == 0
    assert ends(server.pid)


def test_a_server_ends_with_what_started_it() -> None:
    command = [sys.executable, "-m", "turnwise.agents.vllm_server", str(LONG), "--port", "0"]
    with subprocess.Popen(command) as parent:
        while not (servers := psutil.Process(parent.pid).children()):
            time.sleep(0.1)
        parent.kill()
    assert processes(servers[0].pid)
    assert ends(servers[0].pid, within=1800)  # it looks at its input once vLLM is imported
