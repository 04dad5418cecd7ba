"""vLLM's process: how it is started, asked from a thread, and given other weights."""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import vllm._custom_ops  # type: ignore[import-not-found]
from safetensors import safe_open
from safetensors.torch import save_file
from vllm.engine.arg_utils import AsyncEngineArgs  # type: ignore[import-not-found]
from vllm.platforms import current_platform  # type: ignore[import-not-found]
from vllm.v1.engine.async_llm import AsyncLLM  # type: ignore[import-not-found]

from turnwise.environments.errors import InputError

ON_CPU = bool(current_platform.is_cpu())
# vLLM can be told of these in no other way. Without them: a process more for each engine, and a minute of compiling.
CPU_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1"}
if ON_CPU:
    # In vLLM's process, which imports this for `WeightLoader` before it loads the model. Else it would repack linear
    # layers, and could then not give them other weights.
    vllm._custom_ops._supports_onednn = False

T = TypeVar("T")


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
        return AsyncLLM.from_engine_args(arguments)

    thread = LoopThread(f"vLLM {arguments.model}")
    try:
        with _environment(CPU_ENVIRONMENT if ON_CPU else {}):
            return thread.run(start()), thread
    except BaseException:
        thread.close(lambda: None)
        raise


class WeightLoader:
    """What vLLM's workers can do beyond their own methods: this class is mixed into theirs."""

    def load_safetensors(self, folder: str) -> list[str]:
        """Loads all files of a folder into the model; the names of the parameters that none of them set."""
        model = self.model_runner.model  # type: ignore[attr-defined]
        loaded = model.load_weights(_tensors(Path(folder)))
        # A few of vLLM's models do not say what they loaded.
        return [] if loaded is None else sorted({name for name, _ in model.named_parameters()} - loaded)


def save_weights(weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes a state dict where `WeightLoader` finds it."""
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
