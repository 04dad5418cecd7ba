"""OpenAI-compatible servers of one model: asked again, and elsewhere, until one answers or a deadline has passed."""

import asyncio
import contextlib
import email.utils
import hashlib
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, AsyncOpenAI, OpenAIError
from pydantic import BaseModel, ValidationError

from turnwise.environments.errors import InputError

T = TypeVar("T")
AnswerT = TypeVar("AnswerT", bound=BaseModel)
Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]

LOG = logging.getLogger(__name__)
LONGEST_BACKOFF = 60.0
NO_KEY = "no-key-is-needed"


class PassingError(Exception):
    """An answer that cannot be used, of a kind that may come out well when it is asked for again."""


class Line:
    """A connection to one of the base URLs, and the slots of those who may ask there at once."""

    def __init__(self, url: str, key: str, slots: int) -> None:
        self.url = url
        self.root = url.removesuffix("/v1")  # where vLLM has what is not in OpenAI's API
        # The retries are those of `Server.ask`, and so is the timeout.
        self.client = AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=None)
        self.slots = asyncio.Semaphore(slots)
        self.checking = asyncio.Lock()

    async def post(self, path: str, body: Mapping[str, Json], answer: type[AnswerT]) -> AnswerT:
        """The server's answer to `body`, at a path below the base URL or at a URL of its own."""
        return answer.model_validate_json(await self.client.post(path, cast_to=str, body=dict(body)))


class Server:
    """One model, served at one base URL or several ("http://127.0.0.1:8000/v1").

    Nothing is started or closed: connections are kept while there are turns being asked for. Each URL is asked for at
    most `concurrency` turns at once. All turns whose dialogues begin alike go to the same URL, whose prefix cache then
    serves them, unless it is busy or resting.

    What may pass is asked for again: status 408, 409, 429 and 5xx, a connection refused or lost, an answer cut off or
    malformed, none within `timeout` seconds. A URL that failed rests for `rest` seconds and another is asked at once;
    where none is left, a turn waits first: as long as the server's Retry-After says, and at least for `backoff`
    seconds, doubled with every failure and shortened by up to half at random, as the turn's seed has it. A turn fails
    with a TimeoutError, which names the last fault, once it has taken `deadline` seconds; the time in which it waits
    for other turns of this run does not count.

    The key, where one is needed, is read from the environment variable `key_variable`, and is in no exception.

    `version` is stamped on each reply that is asked for from now on; set it where the server's weights change.

    Raises `InputError` for settings that cannot be meant, and for a variable that is not set.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        model: str,
        *,
        key_variable: str = "",
        concurrency: int = 64,
        timeout: float = 600.0,
        deadline: float = 1800.0,
        backoff: float = 0.5,
        rest: float = 30.0,
        version: int = 0,
    ) -> None:
        self.urls = tuple(url.rstrip("/") for url in ([urls] if isinstance(urls, str) else urls))
        if not self.urls or len(set(self.urls)) < len(self.urls) or not all(map(_is_base_url, self.urls)):
            raise InputError(
                "a server needs base URLs, each of them once and like 'http://127.0.0.1:8000/v1', with no user, "
                f"password or query in it; got {len(self.urls)}: name the variable of a key as key_variable"
            )
        if concurrency < 1 or min(timeout, deadline, backoff, rest) <= 0:
            raise InputError(
                "concurrency must be at least 1, and timeout, deadline, backoff and rest above 0; got "
                f"{concurrency=}, {timeout=}, {deadline=}, {backoff=}, {rest=}"
            )
        self.model = model
        self.key_variable = key_variable
        self.concurrency = concurrency
        self.timeout = timeout
        self.deadline = deadline
        self.backoff = backoff
        self.rest = rest
        self.version = version
        self._key()
        self._rests_until = dict.fromkeys(self.urls, 0.0)
        self._told = set[str]()
        self._open: _Open | None = None

    async def ask(self, attempt: Callable[[Line], Awaitable[T]], *, seed: int, opening: str) -> T:
        """The result of the first `attempt` to succeed; `opening` is how the dialogue begins.

        Raises InputError where the server knows no such key, model or path, and ValueError for any other 4xx status.
        """
        jitter, left, failures = random.Random(seed), self.deadline, 0
        async with self._lines() as lines:
            while True:
                line = self._choose(lines, opening)
                async with line.slots:
                    if self._rests(line) and not all(map(self._rests, lines)):
                        continue  # it has failed while this turn waited for a slot
                    began, limit = time.monotonic(), min(self.timeout, left)
                    try:
                        async with asyncio.timeout(limit):
                            return await attempt(line)
                    except TimeoutError:
                        fault = _Fault(f"no answer within {limit:.3g} s")
                    except (OpenAIError, ValidationError, PassingError) as error:
                        fault = self._judge(error, line)
                # Raised out here, since a client's error, even as the context of another, holds the key.
                if fault.fatal is not None:
                    raise fault.fatal
                failures += 1
                self._tell(line.url, fault.reason)
                self._rests_until[line.url] = time.monotonic() + max(self.rest, fault.pause)
                wait = 0.0
                if failures >= len(lines) or all(map(self._rests, lines)):
                    wait = min(self.backoff * 2.0 ** min(failures - 1, 20), LONGEST_BACKOFF)
                    wait = max(wait * (0.5 + jitter.random() / 2), fault.pause)
                left -= time.monotonic() - began + wait
                if left <= 0:
                    raise TimeoutError(
                        f"no server gave a usable answer within the deadline of {self.deadline:g} s; failure "
                        f"{failures}, at {line.url}: {fault.reason}"
                    )
                await asyncio.sleep(wait)

    def _tell(self, url: str, reason: str) -> None:
        """Says once of each URL that it failed: a run that only waits should not do so in silence."""
        if url not in self._told:
            self._told.add(url)
            LOG.warning("%s: %s; each turn is asked for again for up to %g s", url, reason, self.deadline)

    def _choose(self, lines: Sequence[Line], opening: str) -> Line:
        """Of those that do not rest the first with a free slot, in an order that the opening decides."""
        awake = [line for line in lines if not self._rests(line)]
        if not awake:
            return min(lines, key=lambda line: self._rests_until[line.url])
        awake.sort(key=lambda line: hashlib.blake2b(f"{line.url}\0{opening}".encode()).digest())
        return next((line for line in awake if not line.slots.locked()), awake[0])

    def _rests(self, line: Line) -> bool:
        return self._rests_until[line.url] > time.monotonic()

    def _judge(self, error: Exception, line: Line) -> "_Fault":
        """What an exception means for the turn, without the key."""

        def clean(text: object) -> str:
            return " ".join(str(text).replace(line.client.api_key, "[the key]").split())[:500]

        if isinstance(error, ValidationError):
            first = error.errors(include_url=False, include_input=False)[0]
            return _Fault(clean(f"a malformed answer ({'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']})"))
        if isinstance(error, APIConnectionError):
            return _Fault(clean(f"{error.message} {error.__cause__ or ''}"))
        if not isinstance(error, APIStatusError):
            return _Fault(clean(error))
        status, said = error.status_code, clean(error.message)
        if status in (408, 409, 429) or status >= 500:
            return _Fault(said, _retry_after(error.response.headers))
        if status in (401, 403):
            remedy = f"set {self.key_variable} to one" if self.key_variable else "name its variable as key_variable"
            return _Fault(said, fatal=InputError(f"{line.url} needs a key that it accepts ({said}): {remedy}"))
        if status == 404:
            return _Fault(
                said,
                fatal=InputError(
                    f"{line.url} must serve the model {self.model!r}, and for token ids also vLLM's /tokenize and "
                    f"/detokenize ({said}): name a model that its /models lists, and a base URL that ends as the "
                    "server's does, most often in /v1"
                ),
            )
        return _Fault(said, fatal=ValueError(f"{line.url} refuses the request: {said}"))

    def _key(self) -> str:
        if not self.key_variable:
            return NO_KEY
        key = os.environ.get(self.key_variable, "").strip()
        if not key.isascii() or not key.isprintable() or not key or " " in key:
            raise InputError(
                f"a key must be one word of printable ASCII; the environment variable {self.key_variable} is "
                f"{'not that' if key else 'not set'}: export {self.key_variable}=..."
            )
        return key

    @contextlib.asynccontextmanager
    async def _lines(self) -> AsyncIterator[Sequence[Line]]:
        """The connections, which the last turn to leave closes: another event loop could not use them."""
        loop = asyncio.get_running_loop()
        opened = self._open
        if opened is None or opened.loop.is_closed():
            key = self._key()
            opened = self._open = _Open(loop, [Line(url, key, self.concurrency) for url in self.urls])
        if opened.loop is not loop:
            raise RuntimeError("a server is asked from one event loop at a time; another one is using it now")
        opened.turns += 1
        try:
            yield opened.lines
        finally:
            opened.turns -= 1
            if not opened.turns:
                self._open = None
                for line in opened.lines:
                    await line.client.close()


class _Open:
    """What belongs to one event loop, and how many turns are using it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, lines: Sequence[Line]) -> None:
        self.loop = loop
        self.lines = lines
        self.turns = 0


class _Fault(NamedTuple):
    """Why an attempt failed, how long the server wants to be left alone, and what ends the turn, if it must end."""

    reason: str
    pause: float = 0.0
    fatal: Exception | None = None


def _is_base_url(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc and not parts.query


def _retry_after(headers: Mapping[str, str]) -> float:
    """The seconds that Retry-After says, as a number or as a date (RFC 9110, 10.2.3); 0 without one."""
    value = headers.get("retry-after", "0")
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0
