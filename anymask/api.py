"""attention(): the whole walk, top to bottom, and the only place that checks a user's input."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from anymask import ops
from anymask.blocks import cache
from anymask.blocks.block_map import EMPTY, BlockMap
from anymask.errors import InputError
from anymask.expr.mods import text_of
from anymask.expr.trace import SCORE_TEXT, Trace, trace, trace_score
from anymask.kernels.configs import AnyConfig
from anymask.kernels.plan import default_tile
from anymask.masks import MaskFunction, from_function, mask_from
from anymask.problem import Problem
from anymask.scores import ScoreFunction


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: MaskFunction | Tensor | None = None,
    score_mod: ScoreFunction | None = None,
    scale: float | None = None,
    block_map: BlockMap | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
    config: Mapping[str, AnyConfig | Mapping[str, int]] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(score_mod(q k^T * scale) where mask) v, computed only on the tiles where the mask lets something through.

    q: [B, Hq, Sq, D].  k: [B, Hkv, Skv, D].  v: [B, Hkv, Skv, Dv].  Any strides, each its own; Hq a multiple of Hkv; D
    and Dv multiples of 8 from 8 to 256; one dtype of float16, bfloat16 and float32 (float64 on the eager and reference
    backends); any lengths, 0 too. Under autocast they are cast to its dtype.

    mask: a Mask (causal() & document(ids)), a function (b, h, q_idx, kv_idx) -> bool, or a bool tensor broadcastable to
      [B, Hq, Sq, Skv]; True where the query sees the key. None: all pairs.
    score_mod: a function (score, b, h, q_idx, kv_idx) -> score; its gradient is derived, but none for captured tensors.
    scale: of q k^T, before score_mod; 1 / sqrt(D) if None.
    block_map: of anymask.block_map(mask, ...), to build it once yourself; it carries its mask, so `mask` may be left
      out. Without one, a map is built and kept for the next call with the same mask, sizes and captured tensors as they
      are now.
    return_lse: also return the log of the softmax sums (natural log, float32, [B, Hq, Sq]); it may be differentiated.
    deterministic: True asks for bitwise equal results run to run; None for what torch's global flag says. Else the
      Hopper backward adds up dq, in float32, in any order of the keys' tiles, so that it differs by roundings from run
      to run; out, lse, dk and dv do not, and on other GPUs and a CPU nothing does.
    backend: "gluon" (the Hopper kernels), "triton", "eager" or "reference" is obeyed or raises UnsupportedError; None
      chooses by device, dtype and layout.
    config: tiles of the kernels, obeyed or raises: {"forward": {"BLOCK_Q": 64, "num_warps": 4}, "dkdv": ...,
      "dq": ...}, each a Config of kernels/configs.py or some of its fields. "forward" asks for the portable kernel;
      with backend="gluon" it takes HopperConfig's fields, for the Hopper one. {"dkdv": {"is_fused": True}}, fields of
      HopperBackwardConfig, asks for the Hopper backward; other tiles of "dkdv" or "dq" for the portable one. Where dq
      is a kernel of its own there, {"dq": {"num_v_stages": 1}} sets fields of its HopperDqConfig.

    Returns out [B, Hq, Sq, Dv] in q's dtype, or (out, lse). A row that sees no key has out 0, lse -inf and gradients 0.
    Raises InputError, MaskError or UnsupportedError.
    """
    q, k, v = _autocast(q, k, v)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    how = (scale, backend, None if config is None else _config_text(config), deterministic)
    result = _prepared_attention(q, k, v, mask, score_mod, block_map, how)
    if result is None:
        problem = Problem.of(q, k, v)
        if block_map is None:
            program = _trace(mask, score_mod, problem.device)
            blocks = _map_for(problem, program)
        else:
            program = _trace_with(block_map, mask, score_mod, problem)
            blocks = block_map
        result = ops.attention(q, k, v, *_arguments(problem, program, blocks, how))
    return result if return_lse else result[0]


def block_map(
    mask: MaskFunction | Tensor | None,
    B: int,
    H: int,
    Sq: int,
    Skv: int,
    *,
    device: torch.device | str,
    tile: int | tuple[int, int] = 128,
) -> BlockMap:
    """The BlockMap of a mask: which tiles are empty, partial and full. print() draws it, .to_dense() gives the kinds.

    mask: as for attention().  B, H: batch and query heads; the map has one row of its own for each only where the mask
    depends on it.  tile: positions per tile, one number or (q, kv); the Triton kernels take powers of two from 16.
    """
    tile = (tile, tile) if isinstance(tile, int) else tile
    if min(B, H, Sq, Skv) < 0 or min(tile) < 1:
        raise InputError(f"sizes must not be negative and tiles positive, got {B=} {H=} {Sq=} {Skv=} {tile=}")
    device = _numbered(torch.device(device))
    return _find_map(_trace(mask, None, device), B, H, Sq, Skv, tile, device)


def _numbered(device: torch.device) -> torch.device:
    """ "cuda" as "cuda:0", as tensors have it."""
    if device.index is not None:
        return device
    if device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.empty(0, device=device).device


def select(blocks: BlockMap, mask: MaskFunction | Tensor) -> BlockMap:
    """The map of `blocks & mask`: of the tiles that blocks chooses, what the mask leaves of them."""
    if not blocks.is_selection:
        raise InputError(
            "only a map made by BlockMap.from_dense or from_indices is joined with a mask by &; two masks are joined "
            "before the map is built: block_map(a & b, ...)"
        )
    chosen = blocks.bindings.captures[0]
    (tile_q, tile_kv), (B, H, _, _) = blocks.tile, blocks.shape
    function = mask_from(mask).function if isinstance(mask, Tensor) else from_function(mask).function

    def both(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        is_chosen = chosen[b if B > 1 else 0, h if H > 1 else 0, q_idx // tile_q, kv_idx // tile_kv]
        return function(b, h, q_idx, kv_idx) & is_chosen

    alone, joined = trace(function, None, blocks.device), trace(both, None, blocks.device)
    needs = ops.map_heads(text_of(alone.mask, SCORE_TEXT), 2, 2)
    if needs[0] > B or needs[1] > H:
        raise InputError(
            f"the mask differs by batch or head, and the map has B={B} H={H}: expand the tiles that it chooses"
        )
    kinds = _find_map(alone, B, H, blocks.Sq, blocks.Skv, blocks.tile, blocks.device).kinds
    kinds = torch.where(blocks.kinds == EMPTY, blocks.kinds, kinds)
    bindings = joined.mask_bindings
    return replace(
        blocks,
        kinds=kinds,
        text=joined.mask,
        bindings=bindings,
        built_from=cache.identities(bindings.captures),
        is_selection=False,
    )


How = tuple[float | None, str | None, str | None, bool | None]  # scale, backend, config, deterministic


def _prepared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskFunction | Tensor | None,
    score_mod: ScoreFunction | None,
    given: BlockMap | None,
    how: How,
) -> tuple[Tensor, Tensor] | None:
    """out and lse by kernels that a call like this one has made ready, or that are now; None where it cannot be.

    Checks, map, plan and walks of a repeated call are one look-up.
    """
    if not ops.is_direct(q, k, v) or not (q.is_cuda or how[1] in ("gluon", "triton")):
        return None
    if how[0] is not None:
        how = (float(how[0]), *how[1:])  # as the op takes it: Triton would compile anew for an integer
    if given is None:
        program = _trace(mask, score_mod, q.device)
    else:
        program = _trace_with(given, mask, score_mod, Problem.of(q, k, v))
    captures = program.bindings.captures
    what: Hashable = (
        (q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride()),
        (q.dtype, k.dtype, v.dtype, k.device, v.device),
        (program.mask, program.score, program.bindings.ints, program.bindings.floats),
        how,
        # the plan depends on these too: whether TMA can read the tensors, and the precision
        (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 == 0,
        torch.get_float32_matmul_precision(),
    )
    # a given map is what it is, whatever the captured tensors hold now (_trace_with has compared that)
    watched = captures if given is None else (given.kinds,)
    if given is not None:
        what = (what, given.tile, cache.places(captures))

    def prepare() -> Any:
        problem = Problem.of(q, k, v)
        find_map = lambda: _map_for(problem, program) if given is None else given
        blocks = _map_for(problem, program, is_made=False) if given is None else given
        return ops.prepare(q, k, v, find_map, *_arguments(problem, program, blocks, how))

    prepared = cache.find(what, q.device, watched, prepare, is_ours=given is not None)
    return None if prepared is None else ops.prepared_attention(q, k, v, captures, prepared)


def _map_for(problem: Problem, program: Trace, is_made: bool = True) -> BlockMap:
    """The map of a call that is given none.  is_made: with its kinds; else these only tell how many maps there are."""
    sizes = (problem.B, problem.Hq, problem.Sq, problem.Skv)
    tile = default_tile(problem.device.type, max(problem.Sq, problem.Skv))
    if is_made:
        return _find_map(program, *sizes, tile, problem.device)
    heads = ops.map_heads(text_of(program.mask, SCORE_TEXT), problem.B, problem.Hq)
    return BlockMap(torch.empty(*heads, 0, 0, dtype=torch.int8, device="meta"), problem.Sq, problem.Skv, tile)


def _arguments(problem: Problem, program: Trace, blocks: BlockMap, how: How) -> tuple[Any, ...]:
    """What the op `forward` takes besides q, k, v."""
    scale, *rest = how
    bindings = program.bindings
    return (
        bindings.captures,
        bindings.ints,
        bindings.floats,
        text_of(program.mask, program.score),
        blocks.kinds,
        blocks.tile,
        1.0 / math.sqrt(problem.D) if scale is None else scale,
        *rest,
    )


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As autocast does for matmul: float tensors in its dtype, where it is on."""
    first = tensors[0]
    # (to ask is_cuda first takes a fifth of the time of device.type)
    device_type = "cuda" if getattr(first, "is_cuda", False) else getattr(getattr(first, "device", None), "type", "cpu")
    if not torch.is_autocast_enabled(device_type):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device_type)) for tensor in tensors)


def _config_text(config: Mapping[str, AnyConfig | Mapping[str, int]]) -> str:
    return json.dumps({kernel: dict(c) if isinstance(c, Mapping) else asdict(c) for kernel, c in config.items()})


def _trace(mask: MaskFunction | Tensor | None, score_mod: ScoreFunction | None, device: torch.device) -> Trace:
    if mask is None:
        return trace(None, score_mod, device)
    mask = mask_from(mask) if isinstance(mask, Tensor) else from_function(mask)
    program = mask.trace(device)
    if score_mod is None:
        return program
    return trace_score(program.mask, program.mask_bindings, score_mod, device)


def _trace_with(
    given: BlockMap, mask: MaskFunction | Tensor | None, score_mod: ScoreFunction | None, problem: Problem
) -> Trace:
    """The programs of a call whose block map is given: the mask is the map's own.

    Inside a compiled region, where no program is parsed and no storage looked at, only the sizes are checked.
    """
    is_eager = not torch.compiler.is_compiling()
    B, H, _, _ = given.kinds.shape
    fits = B in (1, problem.B) and H in (1, problem.Hq)
    if is_eager:
        needs = ops.map_heads(text_of(given.text, SCORE_TEXT), problem.B, problem.Hq)
        fits = fits and needs[0] <= B and needs[1] <= H
    if (given.Sq, given.Skv) != (problem.Sq, problem.Skv) or not fits:
        raise InputError(
            f"the block map is for B={B} H={H} Sq={given.Sq} Skv={given.Skv}, but q, k, v have B={problem.B} "
            f"Hq={problem.Hq} Sq={problem.Sq} Skv={problem.Skv}: build it for these sizes"
        )
    if given.kinds.device != problem.device:
        raise InputError(f"the block map is on {given.kinds.device} and q on {problem.device}: build it there")
    captures = given.bindings.captures
    if is_eager and given.built_from is not None and given.built_from != cache.identities(captures):
        raise InputError("a tensor that the block map's mask reads was changed since the map was built: build it anew")
    if mask is not None:
        other = _trace(mask, None, problem.device)
        numbers = (other.mask_bindings.ints, other.mask_bindings.floats)
        is_same = (other.mask, *numbers) == (given.text, given.bindings.ints, given.bindings.floats)
        if is_same and is_eager:
            is_same = cache.identities(other.mask_bindings.captures) == cache.identities(captures)
        if not is_same:
            raise InputError(
                "the block map was built for another mask than the one given: pass the map alone, it carries its mask"
            )
    return trace_score(given.text, given.bindings, _shifted(score_mod, given.q_start), problem.device)


def _shifted(score_mod: ScoreFunction | None, q_start: int) -> ScoreFunction | None:
    """score_mod with q_idx counted from query q_start on."""
    if score_mod is None or q_start == 0:
        return score_mod
    return lambda score, b, h, q_idx, kv_idx: score_mod(score, b, h, q_idx + q_start, kv_idx)


def _find_map(
    program: Trace, B: int, H: int, Sq: int, Skv: int, tile: tuple[int, int], device: torch.device
) -> BlockMap:
    """The map of a traced mask: a kept one if mask, sizes and captured tensors are as they were, else a new one."""
    bindings = program.mask_bindings

    def build() -> Tensor:
        text = text_of(program.mask, SCORE_TEXT)
        return ops.make_map(bindings.captures, bindings.ints, bindings.floats, text, B, H, Sq, Skv, tile, device)

    if torch.compiler.is_compiling():  # a compiled graph must own its map: Inductor reuses buffers in place
        return BlockMap(build(), Sq, Skv, tile, program.mask, bindings)
    what = (program.mask, bindings.ints, bindings.floats, B, H, Sq, Skv, tile)
    kinds = cache.find(what, device, bindings.captures, build)
    return BlockMap(kinds, Sq, Skv, tile, program.mask, bindings, cache.identities(bindings.captures))
