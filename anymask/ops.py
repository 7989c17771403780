"""The torch.library ops: schemas, fakes and autograd. Torch-only at import; a kernel's launch imports Triton.

    anymask::block_map   the program, sizes -> the kinds of a BlockMap
    anymask::forward     q, k, v, the program, a map -> out, lse
    anymask::backward    -> dq, dk, dv

Ops carry text and tensors, never Python objects, so that a graph which holds them can be cached, replayed and shipped.
What runs is decided inside by plan.choose, from the real sizes. A program is `text` (Mods.of) over captures, ints and
floats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from anymask import eager, reference
from anymask.blocks import cache
from anymask.blocks.block_map import BlockMap
from anymask.blocks.build import Classify, build
from anymask.errors import InputError, UnsupportedError
from anymask.expr.bindings import Bindings
from anymask.expr.mods import Mods
from anymask.kernels.plan import Plan, arch_of, choose, tma_obstacle_of
from anymask.problem import Problem, dense_like

if TYPE_CHECKING:
    from anymask.kernels.launch import Prepared

_LIBRARY = torch.library.Library("anymask", "DEF")
_PROGRAM = "Tensor[] captures, SymInt[] ints, float[] floats, str text"
_HOW = "Tensor kinds, int[] tile, float scale, str? backend, str? config, bool? deterministic"
_LIBRARY.define(
    f"block_map({_PROGRAM}, SymInt B, SymInt H, SymInt Sq, SymInt Skv, int[] tile, Device device) -> Tensor"
)
_LIBRARY.define(f"forward(Tensor q, Tensor k, Tensor v, {_PROGRAM}, {_HOW}) -> (Tensor, Tensor)")
_LIBRARY.define(
    "backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_PROGRAM}, {_HOW}) -> (Tensor, Tensor, Tensor)"
)

block_map = torch.ops.anymask.block_map.default
forward = torch.ops.anymask.forward.default
backward = torch.ops.anymask.backward.default


def _implements(op: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        _LIBRARY.impl(op, function, "CompositeExplicitAutograd")
        return function

    return register


@_implements("block_map")
def _block_map(
    captures: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    text: str,
    B: int,
    H: int,
    Sq: int,
    Skv: int,
    tile: Sequence[int],
    device: torch.device,
) -> Tensor:
    bindings = Bindings(tuple(captures), tuple(ints), tuple(floats))
    mods = Mods.of(text, bindings.ints, bindings.floats)
    check_reads(mods, bindings, {"b": B, "h": H, "q_idx": Sq, "kv_idx": Skv})
    classify: Classify | None = None
    if device.type == "cuda":
        from anymask.kernels import map_launch

        classify = map_launch.classify
    kinds = build(mods.mask, bindings, B, H, Sq, Skv, device, (tile[0], tile[1]), classify)
    return kinds.expand(*map_heads(text, B, H), -1, -1).contiguous()


@torch.library.register_fake("anymask::block_map")
def _block_map_fake(*program_and_sizes: Any) -> Tensor:
    *_, text, B, H, Sq, Skv, tile, device = program_and_sizes
    shape = (*map_heads(text, B, H), (Sq + tile[0] - 1) // tile[0], (Skv + tile[1] - 1) // tile[1])
    return torch.empty(shape, dtype=torch.int8, device=device)


def map_heads(text: str, B: int, H: int) -> tuple[int, int]:
    """How many maps there are: one for all batches, or heads, where the mask's text does not read b, or h.

    Decided from the text alone, so that neither shape nor sharing depends on the value of a captured number.
    """
    indices = Mods.unbound(text).mask.indices()
    return (B if "b" in indices else 1), (H if "h" in indices else 1)


def check_reads(mods: Mods, bindings: Bindings, sizes: dict[str, int]) -> None:
    """Raise InputError where a bare index, as in ids[b, q_idx], runs past the captured tensor's size."""
    for slot, dim, name in mods.bare_reads:
        shape = bindings.captures[slot].shape
        if sizes[name] > shape[dim]:
            raise InputError(
                f"the mask or score function reads a captured tensor of shape {tuple(shape)} at {name} in dimension "
                f"{dim}, but {name} goes up to {sizes[name] - 1}: capture one with {sizes[name]} entries there, or "
                "clamp the index"
            )


@dataclass(frozen=True)
class _Call:
    """What the arguments of forward and backward stand for."""

    mods: Mods
    bindings: Bindings
    blocks: BlockMap
    plan: Plan
    scale: float

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        captures: list[Tensor],
        ints: list[int],
        floats: list[float],
        text: str,
        kinds: Tensor,
        tile: list[int],
        scale: float,
        backend: str | None,
        config: str | None,
        deterministic: bool | None,
    ) -> _Call:
        problem = Problem.of(q, k, v)
        bindings = Bindings(tuple(captures), tuple(ints), tuple(floats))
        mods = Mods.of(text, bindings.ints, bindings.floats)
        check_reads(mods, bindings, {"b": problem.B, "h": problem.Hq, "q_idx": problem.Sq, "kv_idx": problem.Skv})
        block_map = BlockMap(kinds, problem.Sq, problem.Skv, (tile[0], tile[1]))
        plan = choose(
            problem,
            mods,
            block_map.tile,
            arch=arch_of(problem.device),
            bindings=bindings,
            backend=backend,
            config=None if config is None else json.loads(config),
            deterministic=deterministic,
            tma_obstacle=tma_obstacle_of(q, k, v),
        )
        return _Call(mods, bindings, block_map, plan, scale)


@_implements("forward")
def _forward(q: Tensor, k: Tensor, v: Tensor, *program_and_how: Any) -> tuple[Tensor, Tensor]:
    call = _Call.of(q, k, v, *program_and_how)
    if call.plan.has_kernels:
        from anymask.kernels import launch

        return launch.forward(q, k, v, call.mods, call.bindings, call.blocks, call.plan, call.scale)
    if call.plan.backend == "eager":
        return eager.forward(q, k, v, call.mods, call.bindings, call.blocks, call.scale)
    return reference.forward(q, k, v, call.mods, call.bindings, call.scale)


@torch.library.register_fake("anymask::forward")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *program_and_how: Any) -> tuple[Tensor, Tensor]:
    B, Hq, Sq, _ = q.shape
    return dense_like(q, v.shape[3]), q.new_empty(B, Hq, Sq, dtype=torch.float32)


@_implements("backward")
def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *program_and_how: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call.of(q, k, v, *program_and_how)
    saved = (dout, dlse, q, k, v, out, lse, call.mods, call.bindings, call.blocks)
    if call.plan.has_kernels:
        from anymask.kernels import launch

        return launch.backward(*saved, call.plan, call.scale)
    if call.plan.backend == "eager":
        return eager.backward(*saved, call.scale)
    return reference.backward(dout, dlse, q, k, v, call.mods, call.bindings, call.scale)


@torch.library.register_fake("anymask::backward")
def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return dense_like(q, q.shape[3]), dense_like(k, k.shape[3]), dense_like(v, v.shape[3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, captures, ints, floats, text, kinds, *how = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, kinds, *captures)
    ctx.num_captures, ctx.program, ctx.how = len(captures), (ints, floats, text), how


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse, kinds, *captures = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    return backward(dout, dlse, q, k, v, out, lse, captures, *ctx.program, kinds, *ctx.how)


def _autograd(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    ints, floats, _ = ctx.program
    captures = [None] * ctx.num_captures
    others = (captures, _no_gradient(ints), _no_gradient(floats), None, None, *map(_no_gradient, ctx.how))
    return (*_gradients(ctx, dout, dlse), *others)


def _no_gradient(argument: Any) -> Any:
    """None in the structure that torch.library wants for an argument without tensors: [] for an empty list."""
    return [] if isinstance(argument, list) and not argument else None


torch.library.register_autograd("anymask::forward", _autograd, setup_context=_setup_context)


class _Attention(torch.autograd.Function):
    """The op's own autograd without torch.library's handling of tensor lists: 60 us less a call (CPU, 2026-11-22)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, program_and_how: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        output = forward(q, k, v, *program_and_how)
        _setup_context(ctx, (q, k, v, *program_and_how), output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        return (*_gradients(ctx, dout, dlse), None)


def attention(q: Tensor, k: Tensor, v: Tensor, *program_and_how: Any) -> tuple[Tensor, Tensor]:
    """The op `forward` with its gradient, by the shorter way where no graph is compiled."""
    if torch.compiler.is_compiling():
        return forward(q, k, v, *program_and_how)
    return _Attention.apply(q, k, v, program_and_how)


def is_direct(*tensors: Tensor) -> bool:
    """Nobody watches or changes what is called with these tensors, so that an op may be passed by.

    Such are torch.compile, a dispatch mode (fake tensors, selective checkpointing), a functorch transform, forward-mode
    differentiation, and a class of tensors of its own.
    """
    return (
        not torch.compiler.is_compiling()
        and cache.are_plain(tensors)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def make_map(captures: tuple[Tensor, ...], *rest: Any) -> Tensor:
    """The op block_map, or what it does."""
    return (_block_map if is_direct(*captures) else block_map)(captures, *rest)


def prepare(
    q: Tensor, k: Tensor, v: Tensor, find_map: Callable[[], BlockMap], *program_and_how: Any
) -> Prepared | None:
    """The Triton kernels of a call, made ready for all calls like it; None where another backend runs it.

    find_map: gives the map. The kinds among program_and_how only tell how many maps there are, by batch and by head.
    """
    call = _Call.of(q, k, v, *program_and_how)
    if not call.plan.has_kernels:
        return None
    from anymask.kernels import launch

    has_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    what = (call.mods, call.bindings, call.blocks, call.plan, call.scale)
    return launch.prepare(q, k, v, *what, find_map=find_map, has_gradient=has_gradient)


class PreparedAttention(torch.autograd.Function):
    """What a prepared call computes, with its gradient, past the ops: of q, k, v, captures, prepared."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, captures: tuple[Tensor, ...], prepared: Prepared
    ) -> tuple[Tensor, Tensor]:
        out, lse = prepared.forward(q, k, v, captures)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, *captures)
        ctx.prepared = prepared
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse, *captures = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        # create_graph=True: that there is no second derivative is said only to who asks for it
        saved = (dout, dlse, q, k, v, out, lse, captures)
        if torch.compiler.is_compiling():  # compiled autograd: not into the kernels' launches
            return (*torch.compiler.disable(ctx.prepared.backward)(*saved), None, None)
        if torch.is_grad_enabled():
            return (*_PreparedGradient.apply(ctx.prepared, *saved), None, None)
        return (*ctx.prepared.backward(*saved), None, None)


# Function.apply but for its care for functorch, which is_direct excludes: 1.2 us of its 5.6 (2026-11-22)
_apply = super(torch.autograd.Function, PreparedAttention).apply


def prepared_attention(
    q: Tensor, k: Tensor, v: Tensor, captures: tuple[Tensor, ...], prepared: Prepared
) -> tuple[Tensor, Tensor]:
    """out and lse of tensors that are direct, with their gradient if one may be asked for."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        output: tuple[Tensor, Tensor] = _apply(q, k, v, captures, prepared)
        return output
    return prepared.forward(q, k, v, captures)


class _PreparedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prepared: Prepared, *saved: Any) -> tuple[Tensor, Tensor, Tensor]:
        return prepared.backward(*saved)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        _no_second_derivative(ctx, *gradients)


def _no_second_derivative(ctx: Any, *gradients: Any) -> Any:
    raise UnsupportedError(
        "attention() has no second derivative; the reference for one is plain torch on a small problem"
    )


torch.library.register_autograd("anymask::backward", _no_second_derivative)
