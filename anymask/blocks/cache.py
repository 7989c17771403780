"""What was built already: one block map, and one walk of it, serves every layer that passes the same mask."""

from __future__ import annotations

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

MOST = 256  # maps and walks that are kept; the least recently used goes first

Built = TypeVar("Built")


@dataclass(frozen=True)
class _Entry:
    value: Any
    versions: tuple[int | None, ...]  # of the captured tensors then
    # of the captured tensors; while they are held no new storage gets the same identity
    storages: tuple[StorageWeakRef, ...]


class CacheInfo(NamedTuple):
    """hits, misses: how often a map or a walk was kept, and how often it was made.  kept: how many there are, at most
    `most`.  num_bytes: what they hold."""

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
    if _is_private(captures, is_ours):
        with _lock:
            _misses += 1
        return build()
    # a map is ready for the stream that it was built on, and for no other without waiting
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else None
    key = (what, device, stream, places(captures))
    versions = _versions(captures)
    with _lock:
        entry = _entries.get(key)
        is_kept = entry is not None and entry.versions == versions
        if entry is not None and is_kept and not any(storage.expired() for storage in entry.storages):
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
        tensors = {id(x): x for x in tree_leaves([entry.value for entry in _entries.values()])}
        num_bytes = sum(x.numel() * x.element_size() for x in tensors.values())
        return CacheInfo(_hits, _misses, len(_entries), MOST, num_bytes)


def clear() -> None:
    """Forget all maps and walks, and the counts."""
    global _hits, _misses
    with _lock:
        _entries.clear()
        _hits = _misses = 0


def _is_private(captures: tuple[Tensor, ...], is_ours: bool) -> bool:
    return (
        _get_current_dispatch_mode() is not None
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in captures)
        or (not is_ours and any(tensor.is_inference() for tensor in captures))
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def identities(captures: tuple[Tensor, ...]) -> Hashable:
    """What tells captured tensors, and what they hold, apart. One made in inference mode shows no change in place."""
    return places(captures), _versions(captures)


def places(captures: tuple[Tensor, ...]) -> tuple[Hashable, ...]:
    return tuple((x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype) for x in captures)


def _versions(captures: tuple[Tensor, ...]) -> tuple[int | None, ...]:
    return tuple(None if x.is_inference() else x._version for x in captures)
