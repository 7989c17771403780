"""Masks as values: small expressions that compose with & | ^ ~ and know nothing of tensors' sizes.

A mask says which query sees which key. Calling one with (b, h, q_idx, kv_idx) is how it is traced, so a Mask can be
used inside a mask function of your own, and wherever a FlexAttention mask_mod is expected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anymask.errors import InputError, MaskError
from anymask.expr.evaluate import evaluate
from anymask.expr.mods import Mods, text_of
from anymask.expr.tape import check_captures
from anymask.expr.trace import Trace, trace, with_min_max

if TYPE_CHECKING:
    from os import PathLike

MaskFunction = Callable[[Any, Any, Any, Any], Any]
PerBatch = int | Tensor  # one number for all sequences, or a tensor [B] with one each
NOBODY = torch.iinfo(torch.int32).min  # an id that no token has


class Mask:
    """A function (b, h, q_idx, kv_idx) -> bool that composes: a & b, a | b, a ^ b, ~a.

    function: as for FlexAttention's mask_mod.  name, parameters: what repr() shows.
    is_fixed: function captures the same numbers and the same tensors at each call, so that one trace serves all calls;
      what the tensors hold may change.
    """

    def __init__(self, function: MaskFunction, name: str, *parameters: Any, is_fixed: bool = True):
        self.function = function
        self.name = name
        self.parameters = parameters  # put into words only by repr(): under torch.compile a number may be symbolic
        self.is_fixed: bool = is_fixed and all(part.is_fixed for part in parameters if isinstance(part, Mask))
        self._program: Trace | None = None

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return self.function(b, h, q_idx, kv_idx)

    # Below a Mask's function is called, not the Mask: torch 2.11's Dynamo tests the truth of what it calls.

    def __and__(self, other: MaskFunction) -> Mask:
        other = from_function(other)
        x, y = self.function, other.function
        return Mask(lambda b, h, q_idx, kv_idx: x(b, h, q_idx, kv_idx) & y(b, h, q_idx, kv_idx), "&", self, other)

    def __or__(self, other: MaskFunction) -> Mask:
        other = from_function(other)
        x, y = self.function, other.function
        return Mask(lambda b, h, q_idx, kv_idx: x(b, h, q_idx, kv_idx) | y(b, h, q_idx, kv_idx), "|", self, other)

    def __xor__(self, other: MaskFunction) -> Mask:
        other = from_function(other)
        x, y = self.function, other.function
        return Mask(lambda b, h, q_idx, kv_idx: x(b, h, q_idx, kv_idx) ^ y(b, h, q_idx, kv_idx), "^", self, other)

    def __invert__(self) -> Mask:
        function = self.function
        return Mask(lambda b, h, q_idx, kv_idx: ~function(b, h, q_idx, kv_idx), "~", self)

    def __bool__(self) -> bool:
        raise MaskError(f"{self} is neither true nor false: join masks with & for and, | for or, ~ for not")

    def __repr__(self) -> str:
        words = [_show(parameter) for parameter in self.parameters]
        if self.name in "&|^":
            return f"({f' {self.name} '.join(words)})"
        return f"~{words[0]}" if self.name == "~" else f"{self.name}({', '.join(words)})"

    def shift(self, q: PerBatch = 0, kv: PerBatch = 0) -> Mask:
        """The mask with its index origins moved: row 0 and column 0 become what row q and column kv were.

        For chunked prefill, where the queries start at position q of the sequence: causal().shift(q=start).
        q, kv: a number, or a tensor [B] with one for each sequence.
        """
        function = self.function

        def shifted(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return function(b, h, q_idx + of_batch(q, b), kv_idx + of_batch(kv, b))

        return Mask(shifted, "shift", self, q, kv)

    def trace(self, device: torch.device | None) -> Trace:
        """The mask as a program, traced once if it is fixed. device: where its captured tensors must be."""
        if not self.is_fixed or torch.compiler.is_compiling():
            return trace(self.function, None, device)
        if self._program is None:
            self._program = trace(self.function, None, None)
        check_captures(self._program.bindings, device)
        return self._program

    def to_dense(
        self,
        B: int,
        H: int,
        Sq: int,
        Skv: int,
        device: torch.device | str | None = None,
        *,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """The mask as a bool tensor [B, H, Sq, Skv], True where the query sees the key: to look at, not to compute
        with.

        device: of the captured tensors; None takes the first one's, or the CPU where there is none.
        dtype: that floats in the mask are computed in. Kernels do it in float32: a pair at a tie may differ.
        """
        program = self.trace(None)
        captures = program.bindings.captures
        device = device or (captures[0].device if captures else "cpu")
        mods = Mods.of(text_of(program.mask, program.score), program.bindings.ints, program.bindings.floats)
        b, h, q_idx, kv_idx = (
            torch.arange(size, device=device).view([-1 if i == axis else 1 for i in range(4)])
            for axis, size in enumerate((B, H, Sq, Skv))
        )
        dense = evaluate(mods.mask, program.bindings, b=b, h=h, q_idx=q_idx, kv_idx=kv_idx, dtype=dtype)
        return dense.expand(B, H, Sq, Skv).contiguous()

    def draw(
        self,
        path_or_ax: str | PathLike[str] | Any,
        Sq: int,
        Skv: int,
        *,
        B: int = 1,
        H: int = 1,
        b: int = 0,
        h: int = 0,
        tile: int | tuple[int, int] | None = None,
    ) -> None:
        """A picture of what batch b of B, head h of H shows to Sq queries of Skv keys, tile by tile; needs matplotlib.

        path_or_ax: a .png or .svg file to write, or the matplotlib Axes to draw into.  tile: positions per tile, one
        number or (q, kv); None goes by the lengths. See anymask.draw.
        """
        from anymask.draw import draw_mask

        draw_mask(path_or_ax, self, Sq, Skv, B=B, H=H, b=b, h=h, tile=tile)


def from_function(function: MaskFunction) -> Mask:
    """The mask that a function (b, h, q_idx, kv_idx) -> bool computes; it runs anew at each use of the mask."""
    if isinstance(function, Mask):
        return function
    if not callable(function):
        raise MaskError(
            f"a mask is a function (b, h, q_idx, kv_idx) -> bool or a Mask, got a {type(function).__name__}; "
            "a bool tensor becomes one by mask_from(tensor)"
        )
    return Mask(with_min_max(function), "from_function", function, is_fixed=False)


def mask_from(tensor: Tensor) -> Mask:
    """The mask that a bool tensor holds, broadcastable to [B, Hq, Sq, Skv], True where the query sees the key."""
    if tensor.dtype != torch.bool or tensor.dim() > 4:
        raise InputError(
            f"a mask tensor is bool and broadcastable to [B, Hq, Sq, Skv], got {tensor.dtype} {tuple(tensor.shape)}. "
            "A float tensor that is added to the score belongs in score_mod: lambda s, b, h, q, k: s + bias[b, h, q, k]"
        )

    def at(*index: Any) -> Any:
        aligned = index[4 - tensor.dim() :]
        return tensor[tuple([0 if size == 1 else i for size, i in zip(tensor.shape, aligned, strict=True)])]

    return Mask(at, "mask_from", tensor)


def full() -> Mask:
    """Every query sees every key."""
    return Mask(lambda b, h, q_idx, kv_idx: torch.ones_like(b, dtype=torch.bool), "full")


def causal(offset: PerBatch = 0) -> Mask:
    """Query i sees the keys up to i + offset. offset: a number, or a tensor [B].

    0 aligns the first query with the first key (top-left). Where the queries are the last Sq of Skv tokens, as in
    decoding with a cache, causal(offset=Skv - Sq) aligns the last ones (bottom-right), as FlashAttention's causal=True.
    """
    return Mask(lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + of_batch(offset, b), "causal", offset)


def sliding_window(left: int | None, right: int | None) -> Mask:
    """Query i sees the keys from i - left to i + right, itself included; None: no limit on that side.

    As FlashAttention's window_size=(left, right). sliding_window(1023, 0) is the causal window of 1,024 tokens.
    """

    def window(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        sees = torch.ones_like(b, dtype=torch.bool)
        if left is not None:
            sees = sees & (q_idx - kv_idx <= left)
        if right is not None:
            sees = sees & (kv_idx - q_idx <= right)
        return sees

    return Mask(window, "sliding_window", left, right)


def document(ids: Tensor | None = None, *, cu_seqlens: Tensor | None = None, total: int | None = None) -> Mask:
    """Packed documents: a query sees the keys of its own document. Combine with causal().

    ids: integers [S] or [B, S], in any order, compared as int32, which kernels read fastest; a negative id, down to
    -2^31 + 1, is padding: it sees nothing and nobody sees it.
    cu_seqlens, total: instead of ids, the documents' bounds and the sequence length, as document_ids() takes them; they
    become ids here, once.
    """
    if (ids is None) == (cu_seqlens is None):
        raise InputError("document() takes either ids or cu_seqlens=")
    if ids is None:
        assert cu_seqlens is not None
        ids = document_ids(cu_seqlens, total)
    check_tensor("document ids", ids, "integer", "[S]", "[B, S]")
    return Mask(same_document(ids, ids), "document", ids)


def document_ids(cu_seqlens: Tensor, total: int | None = None) -> Tensor:
    """The document of each token, int32 [total], from the documents' bounds: 0, 1, 2 ... in order, and -1 for padding.

    cu_seqlens: integers [n + 1], ascending, as FlashAttention's varlen functions take them; equal neighbours make an
    empty document.  total: the sequence length, tokens from cu_seqlens[-1] on being padding; without it the length is
    read from cu_seqlens[-1], which on a GPU waits for the device.
    """
    check_tensor("cu_seqlens", cu_seqlens, "integer", "[n + 1]")
    length = int(cu_seqlens[-1]) if total is None else total
    token = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    ids = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return torch.where(token < cu_seqlens[-1], ids, -1).to(torch.int32)


def cross_document(q_ids: Tensor, kv_ids: Tensor, causal: bool = False) -> Mask:
    """Packed documents whose queries and keys differ in length: a query sees the keys of its own document.

    For cross-attention, and for the last tokens of documents that have earlier keys in a cache. In terms of
    FlashAttention's varlen functions: cross_document(document_ids(cu_seqlens_q), document_ids(cu_seqlens_k)).

    q_ids, kv_ids: integers [Sq] or [B, Sq] and [Skv] or [B, Skv], as document() takes them, negative ids being padding.
    causal: within each document, aligned at its end (bottom-right) as FlashAttention's causal=True: the last query sees
    all keys, the one before it all but the last. Which tokens come last in a document is computed once, here.
    """
    check_tensor("q_ids", q_ids, "integer", "[Sq]", "[B, Sq]")
    check_tensor("kv_ids", kv_ids, "integer", "[Skv]", "[B, Skv]")
    same = same_document(q_ids, kv_ids)
    if not causal:
        return Mask(same, "cross_document", q_ids, kv_ids, causal)
    q_after, kv_after = (place_in_document(ids.flip(-1)).flip(-1) for ids in (q_ids, kv_ids))

    def sees(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return same(b, h, q_idx, kv_idx) & (of_token(q_after, b, q_idx) <= of_token(kv_after, b, kv_idx))

    return Mask(sees, "cross_document", q_ids, kv_ids, causal)


def prefix_lm(prefix_len: PerBatch) -> Mask:
    """All see the first prefix_len keys, else causal (Raffel et al. 2020). prefix_len: a number, or a tensor [B]."""

    def sees(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx < of_batch(prefix_len, b)) | (kv_idx <= q_idx)

    return Mask(sees, "prefix_lm", prefix_len)


def padding(lengths: Tensor) -> Mask:
    """Keys from lengths[b] on are padding and seen by none. lengths: integers [B].

    Padding queries still see keys; document() with negative ids also makes those rows empty.
    """
    return Mask(lambda b, h, q_idx, kv_idx: kv_idx < lengths[b], "padding", lengths)


# what masks here and in zoo.py are made of


def of_batch(value: PerBatch, b: Any) -> Any:
    return value[b] if isinstance(value, Tensor) and value.dim() == 1 else value


def of_token(table: Tensor, b: Any, index: Any) -> Any:
    """What a table [S] or [B, S] says of a token."""
    return table[b, index] if table.dim() == 2 else table[index]


def same_document(q_ids: Tensor, kv_ids: Tensor) -> MaskFunction:
    """Query and key have the same id, and not a negative one."""

    def same(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        q_id, kv_id = of_token(q_ids, b, q_idx).int(), of_token(kv_ids, b, kv_idx).int()
        # padding queries take an id that no key has: work for each query, not for each pair
        return torch.where(q_id < 0, NOBODY, q_id) == kv_id

    return same


def place_in_document(ids: Tensor) -> Tensor:
    """How many earlier tokens have the same id: int32, [S] or [B, S] like ids. Never waits for the device."""
    ordered, order = ids.to(torch.int32).sort(dim=-1, stable=True)
    place = torch.arange(ids.shape[-1], device=ids.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(place).scatter_(-1, order, place).to(torch.int32)


def check_tensor(name: str, tensor: Any, kind: str, *shapes: str) -> None:
    """Raise InputError unless tensor is of a kind, "integer" or "bool", with the dimensions of one of the shapes."""
    if not isinstance(tensor, Tensor):
        got = type(tensor).__name__
    elif tensor.is_floating_point() if kind == "integer" else tensor.dtype != torch.bool:
        got = str(tensor.dtype)
    elif tensor.dim() not in [shape.count(",") + 1 for shape in shapes]:
        got = f"shape {tuple(tensor.shape)}"
    else:
        return
    raise InputError(f"{name}: expected a tensor {' or '.join(shapes)} of {kind}s, got {got}")


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return getattr(value, "__name__", str(value))
