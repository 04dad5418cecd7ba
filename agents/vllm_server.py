"""vLLM's OpenAI-compatible server in a process of its own, set up as `TokenServerAgent` needs it.

python -m turnwise.agents.vllm_server MODEL --port 8000
"""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING

from turnwise.agents.team import NO_VLLM
from turnwise.environments.errors import InputError

if TYPE_CHECKING:
    import torch

# vLLM is imported by the process that becomes the server, and by that alone.
COMMAND = "import json, sys; from turnwise.agents.vllm_process import serve; serve(**json.loads(sys.argv[1]))"
GRACE = 20.0  # seconds in which a server may end by itself
# What vLLM puts before each line of a process, and before each line that it logs.
PREFIX = re.compile(r"^\(\w+ pid=\d+\) ?(?:[A-Z]+ [-\d]+ [:\d]+ \[[^]]*\] ?)?", re.MULTILINE)
FAILURE = re.compile(
    r"^[\w.]*(?:Error|Exception): (?!Engine core initialization failed).*?(?=^Traceback|\Z)", re.MULTILINE | re.DOTALL
)


class VLLMServer:
    """A server of one model, `model`, at the base URL `url`; `start` makes one, and `close` or its `with` ends it.

    A key that it is to ask for is read by vLLM from the environment variable VLLM_API_KEY.
    """

    def __init__(self, model: str, host: str, port: int, settings: dict[str, str | int | float | None]) -> None:
        self.model = model
        self.url = f"http://{host}:{port}/v1"
        self._address = host, port
        self._settings = {"model": model, "host": host, "port": port, **settings}
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None

    @classmethod
    def start(
        cls,
        path: str | Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        cache_gigabytes: float = 1.0,
        context: int | None = None,
        dtype: "torch.dtype | str | None" = None,
        max_running: int = 64,
    ) -> "VLLMServer":
        """Serves a checkpoint folder or a model of the Hugging Face hub, and returns once it does.

        By default it is reached from this machine alone, at a port that is free. The other settings are those of
        `VLLMEngine.load`. Raises `InputError` where the model cannot be served, with what vLLM said last.
        """
        if find_spec("vllm") is None:
            raise InputError(NO_VLLM)
        settings: dict[str, str | int | float | None] = {
            "cache_gigabytes": cache_gigabytes,
            "context": context,
            "dtype": None if dtype is None else str(dtype),
            "max_running": max_running,
        }
        server = cls(str(path), host, _free_port(host, port), settings)
        server.restart()
        return server

    def __enter__(self) -> "VLLMServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def restart(self) -> None:
        """Starts the server anew at the same port, and returns once it serves. Raises `InputError` as `start` does."""
        self.close()
        _free_port(*self._address)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115, since it lives as long as the process
        # In a session of its own, so that it can be killed whole, and Ctrl-C is for this process alone. It ends when
        # the pipe does, that is with this process, whatever becomes of that.
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, json.dumps(self._settings)],
            env={"VLLM_LOGGING_LEVEL": "ERROR", **os.environ},
            stdin=subprocess.PIPE,
            stdout=self._said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while not self._healthy():
                if self._process.poll() is not None:
                    raise self._failure()
                time.sleep(0.1)
        except BaseException:
            self.kill()
            raise

    def close(self) -> None:
        """Ends the server, and what it still answers. Does nothing where it has ended."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
        self.kill()

    def kill(self) -> None:
        """Ends the server as a crash would, with all its processes."""
        if self._process is None or self._process.stdin is None or self._said is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._said.close()
        self._process = self._said = None

    def wait(self) -> None:
        """Waits until the server ends by itself, which is an `InputError`, with what vLLM said last."""
        if self._process is not None:
            self._process.wait()
            raise self._failure()

    def _healthy(self) -> bool:
        with closing(http.client.HTTPConnection(*self._address, timeout=5)) as connection:
            try:
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
            except (OSError, http.client.HTTPException):
                return False

    def _failure(self) -> InputError:
        """The last error that the server told of, or else the last that it said, in one line."""
        assert self._said is not None, "a server that was not started has not failed"
        written = os.fstat(self._said.fileno()).st_size
        said = os.pread(self._said.fileno(), 100_000, max(0, written - 100_000)).decode(errors="replace")
        said = PREFIX.sub("", said)
        words = " ".join((FAILURE.findall(said) or [said[-500:]])[-1].split()) or "it has ended without a word"
        refused = words.partition(f"{InputError.__name__}: ")[2]
        return InputError(
            refused
            or f"cannot serve {self.model} with vLLM ({words[:500]}): give the folder that save_pretrained wrote for a "
            "model and its tokenizer, or a hub id, and as many cache_gigabytes as its context needs"
        )


def _free_port(host: str, port: int) -> int:
    """The port, or for 0 one that is free. Raises `InputError` for one that is taken: its health would be another's."""
    if not 0 <= port < 2**16:
        raise InputError(f"a port must be within [0, 65535]; got {port}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"a server needs an IPv4 address of this machine and a free port; {host}:{port} is not ({error}): "
                "choose another"
            ) from error
        return int(probe.getsockname()[1])


def main(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    cache_gigabytes: float = 1.0,
    context: int | None = None,
    dtype: str | None = None,
    max_running: int = 64,
) -> None:
    """Serves MODEL, a checkpoint folder or a hub id, until Ctrl-C. A key is read from VLLM_API_KEY."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        suppress(KeyboardInterrupt),
        VLLMServer.start(
            model,
            host=host,
            port=port,
            cache_gigabytes=cache_gigabytes,
            context=context,
            dtype=dtype,
            max_running=max_running,
        ) as server,
    ):
        print(f"serving {model} until Ctrl-C; examples take it with --engine server --url {server.url}", flush=True)
        server.wait()


if __name__ == "__main__":
    from turnwise.command import run

    run(main)
