"""What was built already: one block map, its walks and the call made ready serve every layer with the same mask."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

MOST = 256  # of all that is kept; the least recently used goes first

Built = TypeVar("Built")


@dataclass(frozen=True)
class _Entry:
    value: Any
    versions: tuple[int | None, ...]  # of the captured tensors then
    # of the captured tensors; while they are held no new storage gets the same identity
    storages: tuple[StorageWeakRef, ...]


class CacheInfo(NamedTuple):
    """Of maps, their walks, and calls made ready to start. hits, misses: how often one was kept, and how often made.
    kept: how many there are, at most `most`.  num_bytes: what they hold."""

    hits: int
    misses: int
    kept: int
    most: int
    num_bytes: int


_hits = _misses = 0
_entries: OrderedDict[Hashable, _Entry] = OrderedDict()
_lock = threading.Lock()


def find(
    what: Hashable,
    device: torch.device,
    captures: tuple[Tensor, ...],
    build: Callable[[], Built],
    is_ours: bool = False,
) -> Built:
    """The kept value for `what` over these captured tensors, or what build() makes, then kept.

    A captured tensor is told apart by storage, place in it, layout and version, so one that was changed in place gives
    a new value, which takes the place of the old one. Nothing is kept where that cannot be known or would be wrong:
    tensors made in inference mode have no version (is_ours: they never change), and under a dispatch mode (fake
    tensors, checkpointing) or while a CUDA graph is captured results are not for others.
    """
    global _hits, _misses
    versions = _versions(captures)
    is_cuda = _is_cuda(device)
    if (None in versions and not is_ours) or not are_plain(captures) or (is_cuda and _is_captured()):
        with _lock:
            _misses += 1
        return build()
    # a map is ready for the stream that it was built on, and for no other without waiting
    stream = stream_of(device) if is_cuda else None
    key = (what, device, stream, places(captures))
    with _lock:
        entry = _entries.get(key)
        # its storages, being those of captures, are not expired
        if entry is not None and entry.versions == versions:
            _entries.move_to_end(key)
            _hits += 1
            value: Built = entry.value
            return value
        _misses += 1
    value = build()
    storages = tuple(StorageWeakRef(tensor.untyped_storage()) for tensor in captures)
    with _lock:
        for stale in [k for k, e in _entries.items() if any(storage.expired() for storage in e.storages)]:
            del _entries[stale]
        _entries[key] = _Entry(value, versions, storages)
        _entries.move_to_end(key)
        while len(_entries) > MOST:
            _entries.popitem(last=False)
    return value


def info() -> CacheInfo:
    """What is kept now, and how often it was of use in this process."""
    with _lock:
        leaves = tree_leaves([entry.value for entry in _entries.values()])
        tensors = {id(x): x for x in leaves if isinstance(x, Tensor)}
        num_bytes = sum(x.numel() * x.element_size() for x in tensors.values())
        return CacheInfo(_hits, _misses, len(_entries), MOST, num_bytes)


def clear() -> None:
    """Forget all that is kept, and the counts."""
    global _hits, _misses
    with _lock:
        _entries.clear()
        _hits = _misses = 0


def are_plain(tensors: tuple[Tensor, ...]) -> bool:
    """They are tensors of no class of their own, and no dispatch mode sees what is done with them."""
    return not [x for x in tensors if type(x) not in _PLAIN] and _get_current_dispatch_mode() is None


def stream_of(device: torch.device) -> Hashable:
    """The current stream of a GPU, told apart from all others."""
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    return (stream, threading.get_ident()) if stream == _PER_THREAD else stream


@functools.cache
def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"  # which makes a string each time


_PER_THREAD = 2  # cudaStreamPerThread, as hipStreamPerThread: a stream of each thread's own
_PLAIN = (Tensor, torch.nn.Parameter)
_is_captured = torch.cuda.is_current_stream_capturing  # by a CUDA graph


def identities(captures: tuple[Tensor, ...]) -> Hashable:
    """What tells captured tensors, and what they hold, apart. One made in inference mode shows no change in place."""
    return places(captures), _versions(captures)


def places(captures: tuple[Tensor, ...]) -> tuple[Hashable, ...]:
    return tuple([(x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype) for x in captures])


def _versions(captures: tuple[Tensor, ...]) -> tuple[int | None, ...]:
    return tuple([None if x.is_inference() else x._version for x in captures])
