"""vLLM's process: how it is started, asked from a thread, and given other weights."""

import asyncio
import math
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

import torch
import vllm._custom_ops  # type: ignore[import-not-found]
from safetensors import safe_open
from safetensors.torch import save_file
from vllm.engine.arg_utils import AsyncEngineArgs  # type: ignore[import-not-found]
from vllm.platforms import current_platform  # type: ignore[import-not-found]
from vllm.v1.engine.async_llm import AsyncLLM  # type: ignore[import-not-found]

from turnwise.agents.chat import ChatTemplate
from turnwise.agents.transformers_engine import checkpoint, load_tokenizer
from turnwise.environments.errors import InputError

ON_CPU = bool(current_platform.is_cpu())
# vLLM can be told of these in no other way. Without them: a process more for each engine, and a minute of compiling.
CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCH_COMPILE_DISABLE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
if ON_CPU:
    # In vLLM's process, which imports this for `WorkerExtension` before it loads the model. Else it would repack linear
    # layers, and could then not give them other weights.
    vllm._custom_ops._supports_onednn = False

T = TypeVar("T")


def vllm_settings(
    model: str | Path, *, cache_gigabytes: float, context: int | None, dtype: torch.dtype | str | None, max_running: int
) -> dict[str, str | int | float]:
    """What an engine and a server both tell vLLM; what is left out is for vLLM to choose.

    Raises `InputError` for settings that cannot be meant.
    """
    if max_running < 1 or not 0 < cache_gigabytes < math.inf:
        raise InputError(
            "max_running must be at least 1 and cache_gigabytes a number above 0; got "
            f"max_running={max_running}, cache_gigabytes={cache_gigabytes}"
        )
    settings: dict[str, str | int | float] = {
        "model": str(model),
        "max_num_seqs": max_running,
        "kv_cache_memory_bytes": int(cache_gigabytes * 1e9),
        "gpu_memory_utilization": 0.01,  # beside the line above, only the share that must be free at the start
        "enable_prefix_caching": True,
        "enforce_eager": ON_CPU,
        "use_tqdm_on_load": False,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
    }
    if context is not None:
        settings["max_model_len"] = context
    if dtype is not None or ON_CPU:
        settings["dtype"] = str(dtype or torch.float32).removeprefix("torch.")
    if ON_CPU:
        # A prompt that is computed in pieces rewinds its seed, which no random generator on a CPU can.
        settings |= {"block_size": 32, "enable_chunked_prefill": False}
    return settings


class LoopThread:
    """An event loop in a thread of its own: vLLM's lives longer than the loops of those who ask it."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[None, None, T]) -> T:
        """What the coroutine returns, for a caller that can block."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    async def wait(self, coroutine: Coroutine[None, None, T]) -> T:
        """What the coroutine returns, for a caller on another event loop, whose cancellation reaches it."""
        if self.loop.is_closed():
            coroutine.close()
            raise RuntimeError("the engine is closed")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.loop))

    def close(self, last: Callable[[], object]) -> None:
        """Cancels what still runs, calls `last` in the thread, and ends it. Does nothing the second time."""
        if not self.loop.is_closed():
            self.run(self._end(last))
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()

    async def _end(self, last: Callable[[], object]) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        last()


def start_vllm(arguments: AsyncEngineArgs) -> tuple[AsyncLLM, LoopThread]:
    """Starts vLLM's process, and the thread whose event loop talks with it."""

    async def start() -> AsyncLLM:
        llm = AsyncLLM.from_engine_args(arguments)
        await llm.collective_rpc("end_with_parent")
        return llm

    thread = LoopThread(f"vLLM {arguments.model}")
    try:
        with _environment(CPU_ENVIRONMENT if ON_CPU else {}):
            return thread.run(start()), thread
    except BaseException:
        thread.close(lambda: None)
        raise


def serve(
    model: str,
    host: str,
    port: int,
    *,
    cache_gigabytes: float,
    context: int | None,
    dtype: str | None,
    max_running: int,
) -> None:
    """Makes this process vLLM's OpenAI-compatible server. It ends, at the latest, when its standard input does.

    Raises `InputError`, or what vLLM raises, where it cannot serve.
    """
    threading.Thread(target=_end_with_input, daemon=True).start()
    path = checkpoint(model)
    settings = vllm_settings(
        path, cache_gigabytes=cache_gigabytes, context=context, dtype=dtype, max_running=max_running
    )
    ChatTemplate(load_tokenizer(path))
    settings |= {"host": host, "port": port, "disable_uvicorn_access_log": True}
    sys.argv = ["vllm"]
    names = dict.fromkeys([model, str(path.resolve() if isinstance(path, Path) else path)])
    for name, value in settings.items():
        option = ("--no-" if value is False else "--") + name.replace("_", "-")
        sys.argv += [option] if isinstance(value, bool) else [option, str(value)]
    sys.argv += ["--served-model-name", *names]
    with _environment(CPU_ENVIRONMENT if ON_CPU else {}):
        runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


def _end_with_input() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.killpg(0, signal.SIGKILL)  # itself and vLLM's other processes


class WorkerExtension:
    """What vLLM's workers can do beyond their own methods: this class is mixed into theirs."""

    def end_with_parent(self) -> None:
        """Has this process end when the one that started it does, be it killed; by itself it would keep its memory."""
        parent = multiprocessing.parent_process()
        assert parent is not None, "vLLM has a process of its own"
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()

    def load_safetensors(self, folder: str) -> list[str]:
        """Loads all files of a folder into the model; the names of the parameters that none of them set."""
        model = self.model_runner.model  # type: ignore[attr-defined]
        loaded = model.load_weights(_tensors(Path(folder)))
        # A few of vLLM's models do not say what they loaded.
        return [] if loaded is None else sorted({name for name, _ in model.named_parameters()} - loaded)


def _end_after(process: BaseProcess) -> None:
    process.join()
    os.kill(os.getpid(), signal.SIGKILL)


def save_weights(weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes a state dict where `WorkerExtension` finds it."""
    # Copies, since the file format refuses tensors that share memory, as tied ones do.
    tensors = {name: weight.detach().to("cpu", copy=True).contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / "model.safetensors")


def weights_folder(folder: str | Path) -> Path:
    """The folder as vLLM's process finds it. Raises `InputError` where it holds no weights."""
    folder = Path(folder).expanduser()
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"weights must be a state dict or a folder with safetensors files; {folder} has none")
    return folder.absolute()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets what is not set, and in the end undoes that and what vLLM itself sets, LD_PRELOAD for one."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in variables.items() if name not in before})
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, since it is no mapping
                yield name, tensors.get_tensor(name)
