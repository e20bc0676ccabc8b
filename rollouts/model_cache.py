"""Models in memory, within a budget of bytes: least recently used ones go first, the next one is read ahead.

In two stages, because the libraries that build models change global state while they do: a thread *reads* weights into
plain tensors, and the thread that draws *builds* the model from them, in a fraction of the time.
"""

import ctypes
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from threading import RLock
from typing import Any, Generic, Literal, TypeVar

from rewards.batching import release_memory

Weights = TypeVar("Weights")
Model = TypeVar("Model")
Stage = Literal["host", "device"]


class ModelTooLarge(Exception):
    """A model that is larger than the whole budget.

    Attributes:
        needed: Bytes.
        budget: Bytes.
    """

    def __init__(self, name: str, needed: int, budget: int):
        super().__init__(f"{name} takes {needed / 1e9:.3f} GB, but the budget is {budget / 1e9:.3f} GB.")
        self.needed, self.budget = needed, budget


@dataclass
class _Entry:
    size: int
    weights: Future[Any] | None = None
    model: Any = None
    building: bool = False
    ahead: bool = False  # read ahead, and not used yet


class ModelCache(Generic[Weights, Model]):
    """Models by name. One thread calls `get`; the other methods may be called from any.

    Without `host_bytes`, weights and models share one budget and a model takes over its weights: for a CPU. With it,
    weights stay in host memory while there is room, so that a model that had to leave the device is not read again.
    """

    def __init__(
        self,
        *,
        read: Callable[[str], Weights],
        build: Callable[[str, Weights], Model],
        size: Callable[[str], int],
        free: Callable[[Model], None],
        device_bytes: int,
        host_bytes: int | None = None,
        keep_weights: bool = True,
    ):
        """Nothing is read yet.

        Args:
            read: Weights of a model, into host memory; called from any thread.
            build: The model, on its device; called from `get`.
            size: Bytes of a model; quick.
            free: Gives a model's memory back, even if something still refers to it.
            device_bytes: Budget of all models.
            host_bytes: Budget of weights, if it is a separate one.
            keep_weights: Whether they stay there when a model has been made of them.
        """
        self._read, self._build, self._size, self._free = read, build, size, free
        self._budget: dict[Stage, int] = {"device": device_bytes, "host": host_bytes or device_bytes}
        self._shared = host_bytes is None
        self._keep_weights = keep_weights and not self._shared
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._in_use = ""
        self._lock = RLock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-weights")

    def get(self, name: str) -> Model:
        """The model, which then stays in memory at least until the next `get`.

        Raises:
            ModelTooLarge: It would not fit even alone; found before anything is read.
            Exception: Whatever `size`, `read` or `build` raise; the model is then not in the cache.
        """
        with self._lock:
            self._in_use = name
            entry = self._entries.get(name)
            if entry is not None and entry.model is not None:
                self._entries.move_to_end(name)
                return entry.model
            entry, keep_weights = self._admit(name, entry)
        try:
            weights = self._read(name) if entry.weights is None else entry.weights.result()
            model = self._build(name, weights)
        except BaseException:
            with self._lock:
                del self._entries[name]
            raise
        with self._lock:
            entry.model, entry.building = model, False
            if not keep_weights:
                entry.weights = None
            elif entry.weights is None:
                entry.weights = Future()
                entry.weights.set_result(weights)
        return model

    def prefetch(self, name: str) -> bool:
        """Read weights in the background, if they are not here and there is room beside the model in use.

        Errors of reading are raised by `get`.

        Returns:
            Whether the model is here or on its way.
        """
        with self._lock:
            if name not in self._entries:
                size = self._size(name)
                keep = {self._in_use, *self._unused()}
                if size > self._budget["device"] or not self._make_room(size, "host", keep):
                    return False
                self._entries[name] = _Entry(size, self._thread.submit(self._read, name), ahead=True)
            return True

    def names(self) -> set[str]:
        """Models that need not be read; those that are being read are left out."""
        with self._lock:
            return {name for name, entry in self._entries.items() if entry.model is not None or _is_read(entry)}

    def used_bytes(self, stage: Stage = "device") -> int:
        """What is taken of a budget, by what is being read too."""
        with self._lock:
            return sum(entry.size for entry in self._entries.values() if self._holds(entry, stage))

    def close(self) -> None:
        """Free everything and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            for entry in self._entries.values():
                self._evict(entry)
            self._entries.clear()
        give_back_memory()

    def _admit(self, name: str, entry: _Entry | None) -> tuple[_Entry, bool]:
        """Room for a model, and whether there is room to keep its weights beside it."""
        size = self._size(name) if entry is None else entry.size
        if size > self._budget["device"]:
            raise ModelTooLarge(name, size, self._budget["device"])
        entry = self._entries.setdefault(name, entry or _Entry(size))
        self._entries.move_to_end(name)
        keep_weights = self._keep_weights and (
            entry.weights is not None or self._make_room(size, "host", self._unused())
        )
        entry.building, entry.ahead = True, False
        # What was read ahead is spared if possible: it is likely to be next.
        self._make_room(0, "device", {name, *self._unused()}) or self._make_room(0, "device", {name})
        return entry, keep_weights

    def _unused(self) -> set[str]:
        return {name for name, entry in self._entries.items() if entry.ahead}

    def _holds(self, entry: _Entry, stage: Stage) -> bool:
        if self._shared:
            return True
        return entry.weights is not None if stage == "host" else entry.building or entry.model is not None

    def _make_room(self, size: int, stage: Stage, keep: Collection[str]) -> bool:
        """Evict what was used least recently until `size` bytes are free; nothing if that can't be reached."""
        held = [(name, entry) for name, entry in self._entries.items() if self._holds(entry, stage)]
        excess = sum(entry.size for _, entry in held) + size - self._budget[stage]
        dispensable = [(name, entry) for name, entry in held if name not in keep]
        if excess > sum(entry.size for _, entry in dispensable):
            return False
        if excess <= 0:
            return True
        for name, entry in dispensable:
            if excess > 0:
                excess -= entry.size
                self._evict(entry, stage)
                if entry.weights is None and entry.model is None:
                    del self._entries[name]
        give_back_memory()
        return True

    def _evict(self, entry: _Entry, stage: Stage | None = None) -> None:
        if entry.weights is not None and (stage != "device" or self._shared):
            if not entry.weights.cancel():
                entry.weights.exception()  # reading can't be stopped; its memory has to be free when this returns
            entry.weights = None
        if entry.model is not None and (stage != "host" or self._shared):
            self._free(entry.model)
            entry.model = None


def _is_read(entry: _Entry) -> bool:
    future = entry.weights
    return future is not None and future.done() and not future.cancelled() and future.exception() is None


def give_back_memory() -> None:
    """Return freed memory to the GPU's driver and to the system."""
    release_memory()
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)


@cache
def _libc() -> Any:
    """glibc keeps what is freed in small pieces; only `malloc_trim` gives it back."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None
