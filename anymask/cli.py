"""The command line: `python -m anymask explain MASK --sq 4096` says what becomes of a mask, and runs no attention.

It needs no GPU and imports no Triton: what it says of a GPU follows from the plan for that architecture.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import math
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import anymask
from anymask.blocks.block_map import EMPTY, FULL, PARTIAL, BlockMap
from anymask.blocks.build import stages
from anymask.blocks.walk import WORD
from anymask.draw import MOST_COUNTED, SAMPLES, pairs_of_tiles, visible_pairs
from anymask.errors import AnyMaskError, InputError
from anymask.expr.emit import emit, emit_hide
from anymask.expr.emit_bounds import emit_bounds
from anymask.expr.interval import Grid
from anymask.expr.ir import to_text
from anymask.expr.mods import Mods, text_of
from anymask.expr.trace import SCORE_TEXT
from anymask.kernels.configs import AnyConfig
from anymask.kernels.plan import KERNELS, Plan, choose, default_tile, is_walked, walk_shapes
from anymask.masks import Mask, from_function
from anymask.problem import Problem

DTYPES = ("bfloat16", "float16", "float32", "float64")
FILE_AND_FUNCTION = re.compile(r"(.+\.py):([^\W\d]\w*)")

EPILOG = """\
MASK is a Python expression over the public names of anymask, torch and the sizes B, H, Sq and Skv, or a mask function
(b, h, q_idx, kv_idx) -> bool or a Mask in a file:

    python -m anymask explain "causal() & sliding_window(1023, 0)" --sq 4096
    python -m anymask explain "causal(offset=Skv - Sq)" --sq 128 --skv 4096 --draw mask.png
    python -m anymask explain my_masks.py:mine --sq 4096 --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, or 2 after a message about what is wrong with the call."""
    arguments = _parser().parse_args(argv)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a user's file prints is not ours
            text = _explain(arguments)
        print(text, flush=True)
    except BrokenPipeError:  # as under `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (AnyMaskError, OSError) as error:
        message = " | ".join(line.strip() for line in str(error).splitlines())
        print(f"anymask {arguments.command}: {message}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m anymask", description="Flash attention with any mask.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    explain = commands.add_parser(
        "explain",
        help="what becomes of a mask: its program, its tiles, the work it saves, the plan, the Triton functions",
        description="Say what becomes of a mask. No attention is run, and no GPU needed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.add_argument("mask", metavar="MASK", help="a Python expression, or FILE.py:FUNCTION")
    explain.add_argument("--sq", type=_positive, required=True, metavar="N", help="queries")
    explain.add_argument("--skv", type=_positive, metavar="N", help="keys; as many as queries by default")
    explain.add_argument("--batch", type=_positive, default=1, metavar="N", help="sequences (1)")
    explain.add_argument("--heads", type=_positive, default=1, metavar="N", help="query heads (1)")
    explain.add_argument("--head-dim", type=_positive, default=128, metavar="N", help="of q, k and v (128)")
    explain.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of q, k and v (bfloat16)")
    explain.add_argument("--arch", type=_arch, default="sm_90", help="sm_90 (the default), sm_80, gfx942, cpu ...")
    explain.add_argument("--tile", type=_tile, help="positions per tile, N or QxKV; what attention() takes by default")
    explain.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    explain.add_argument("--draw", type=Path, metavar="PATH", help="also write a picture, .png or .svg (matplotlib)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def _tile(text: str) -> tuple[int, int]:
    sizes = [_positive(size) for size in text.split("x")]
    if len(sizes) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no tile: write N or QxKV")
    return sizes[0], sizes[-1]


def _arch(text: str) -> str:
    if not re.fullmatch(r"sm_\d{2,3}|gfx\w+|cpu", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no architecture: write sm_90, gfx942 or cpu, for example")
    return text


def _explain(arguments: argparse.Namespace) -> str:
    B, H, Sq, Skv = arguments.batch, arguments.heads, arguments.sq, arguments.skv or arguments.sq
    mask = load_mask(arguments.mask, {"B": B, "H": H, "Sq": Sq, "Skv": Skv})
    q, k, v = (
        torch.empty(B, H, S, arguments.head_dim, dtype=getattr(torch, arguments.dtype), device="meta")
        for S in (Sq, Skv, Skv)
    )
    device_type = "cpu" if arguments.arch == "cpu" else "cuda"
    tile = arguments.tile or default_tile(device_type, max(Sq, Skv))
    captures = mask.trace(None).bindings.captures
    device = captures[0].device if captures else "cpu"
    blocks = anymask.block_map(mask, B, H, Sq, Skv, device=device, tile=tile)
    facts = explain(mask, blocks, Problem.of(q, k, v), arguments.arch)
    if arguments.draw is not None:
        blocks.draw(arguments.draw)
        facts["drawn"] = str(arguments.draw)
    return json.dumps(facts, indent=2) if arguments.json else describe(facts)


def load_mask(what: str, sizes: dict[str, int]) -> Mask:
    """The mask that an expression, or FILE.py:FUNCTION, names. Raises InputError or MaskError."""
    match = FILE_AND_FUNCTION.fullmatch(what)
    if match:
        path, name = match.groups()
        if not Path(path).is_file():
            raise InputError(f"there is no file {path}")
        sys.path.insert(0, str(Path(path).parent))  # as for `python FILE.py`: it may import its neighbours
        names = _run(path, lambda: runpy.run_path(path))
        if name not in names:
            raise InputError(f"{path} defines no {name}{_suggestion(name, names)}")
        value = names[name]
    elif what.endswith(".py"):
        raise InputError(f"say which function of {what}: {what}:FUNCTION")
    else:
        names = {name: getattr(anymask, name) for name in anymask.__all__} | {"torch": torch} | sizes
        value = _run(what, lambda: eval(what, names), names)
    return from_function(value)


def _run(what: str, function: Callable[[], Any], names: Iterable[str] = ()) -> Any:
    """function(), a user's code, whose errors become InputErrors; names: what it may have meant by an unknown name."""
    try:
        return function()
    except AnyMaskError:
        raise
    except NameError as error:
        raise InputError(f"{what}: {error}{_suggestion(error.name or '', names)}") from error
    except Exception as error:
        raise InputError(f"{what}: {type(error).__name__}: {error}") from error


def _suggestion(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def explain(mask: Mask, blocks: BlockMap, problem: Problem, arch: str) -> dict[str, Any]:
    """What there is to say of a mask, ready for JSON.

    blocks: its map, for the sizes of problem.  arch: as plan.choose takes it.
    FLOPs are those of q k^T and P v in the forward: of all pairs, of the pairs in visited tiles, of visible pairs.
    """
    bindings, (Bm, Hm, _, _) = blocks.bindings, blocks.shape
    mods = Mods.of(text_of(blocks.text, SCORE_TEXT), bindings.ints, bindings.floats)
    plan = choose(problem, mods, blocks.tile, arch=arch, bindings=bindings)
    counts = {name: int((blocks.kinds == kind).sum()) for kind, name in _KINDS.items()}
    decided = stages(mods.mask, bindings, Grid(Bm, Hm, blocks.Sq, blocks.Skv, blocks.tile, blocks.device))
    shared_by = problem.B * problem.Hq // (Bm * Hm)  # batches and heads that one of the maps serves
    most = MOST_COUNTED // (Bm * Hm)
    counted = [visible_pairs(blocks, b, h, most) for b in range(Bm) for h in range(Hm)]
    visible = sum(count for count, _ in counted) * shared_by
    visited = int(((blocks.kinds != EMPTY) * pairs_of_tiles(blocks)).sum()) * shared_by
    pairs = problem.B * problem.Hq * problem.Sq * problem.Skv
    flops_a_pair = 2 * (problem.D + problem.Dv)
    walks = _walk_bytes(blocks, plan, mods.has_mask)
    return {
        "mask": repr(mask),
        "batch": problem.B,
        "heads": problem.Hq,
        "sq": problem.Sq,
        "skv": problem.Skv,
        "head_dim": problem.D,
        "dtype": _name(problem.dtype),
        "arch": arch,
        "expression": to_text(mods.mask),
        "captured": {
            "tensors": [{"dtype": _name(tensor.dtype), "shape": list(tensor.shape)} for tensor in bindings.captures],
            "ints": list(bindings.ints),
            "floats": [x if math.isfinite(x) else str(x) for x in bindings.floats],  # JSON has no inf
        },
        "tile": list(blocks.tile),
        "map_shape": list(blocks.shape),
        "tiles": counts,
        "decided_by": {stage.replace(" ", "_"): count for stage, count in decided.items()},
        "density": blocks.density(),
        "visible_pairs": visible,
        "visible_pairs_are_exact": all(is_exact for _, is_exact in counted),
        "pairs": pairs,
        "forward_flops": {
            "dense": flops_a_pair * pairs,
            "visited": flops_a_pair * visited,
            "visible": flops_a_pair * visible,
        },
        "bytes": {"kinds": blocks.kinds.nbytes, "walks": {kernel: size for kernel, (_, size) in walks.items()}}
        | {"total": blocks.kinds.nbytes + sum(dict(walks.values()).values())},
        "plan": {"backend": plan.backend, "why": plan.why, "precision": plan.precision}
        | {kernel: _config(getattr(plan, kernel)) for kernel in walks},
        "functions": _functions(mods, blocks, plan),
        "picture": str(blocks),
    }


def _config(config: AnyConfig) -> dict[str, Any]:
    return {"BLOCK_Q": config.BLOCK_Q, "BLOCK_KV": config.BLOCK_KV} | asdict(config)


_KINDS = {EMPTY: "empty", PARTIAL: "partial", FULL: "full"}


def _walk_bytes(blocks: BlockMap, plan: Plan, has_mask: bool) -> dict[str, tuple[tuple[Any, ...], int]]:
    """For each kernel of the plan which walk of the map it reads, and the bytes of that; two may read the same one."""
    walks = {}
    shapes = walk_shapes(plan, blocks.tile) if plan.has_kernels else ()
    for kernel, (tile, is_kv_row) in zip(KERNELS, shapes, strict=False):
        if getattr(plan, kernel) is None:  # another one computes what it would
            continue
        num_rows, num_columns = -(-blocks.Sq // tile[0]), -(-blocks.Skv // tile[1])
        if is_kv_row:
            num_rows, num_columns = num_columns, num_rows
        # words and rows of Walk
        of_row = 2 * 8 * -(-num_columns // WORD) + 2 * 4 + 4
        size = blocks.shape[0] * blocks.shape[1] * num_rows * of_row
        walks[kernel] = (tile, is_kv_row), size if is_walked(plan, kernel, has_mask) else 0
    return walks


def _functions(mods: Mods, blocks: BlockMap, plan: Plan) -> dict[str, str]:
    """The texts that kernels' functions are made from: hide for attention, bounds and mask for the map."""
    if not plan.has_kernels:
        return {}
    wide = blocks.bindings.wide_slots()
    return {
        "hide": emit_hide(mods.mask, "hide", wide, plan.is_ptx),
        "bounds": emit_bounds(mods.mask, "bounds", wide, overhang=frozenset()),
        "mask": emit(mods.mask, "mask", wide, overhang=frozenset()),
    }


def describe(facts: dict[str, Any]) -> str:
    """The facts of explain(), for people."""
    captured, size, flops = facts["captured"], facts["bytes"], facts["forward_flops"]
    (B, H, nQ, nKV), (tile_q, tile_kv) = facts["map_shape"], facts["tile"]
    pairs, visible = facts["pairs"], facts["visible_pairs"]
    is_exact = facts["visible_pairs_are_exact"]
    how = "counted" if is_exact else f"in partial tiles estimated from {SAMPLES:,} random pairs a map"
    decided = ", ".join(f"{stage.replace('_', ' ')} {num:,}" for stage, num in facts["decided_by"].items())
    walks = "".join(f", walk of {kernel} {num:,}" for kernel, num in size["walks"].items())
    sections = {
        facts["mask"]: [
            f"B {facts['batch']}, H {facts['heads']}, Sq {facts['sq']:,}, Skv {facts['skv']:,}, D {facts['head_dim']}, "
            f"{facts['dtype']}, on {facts['arch']}",
        ],
        "Expression (canonical text, simplified)": [
            f"%{i:<3} {line}" for i, line in enumerate(facts["expression"].splitlines())
        ],
        "Captured": [
            *(f"tensor {i}: {x['dtype']} {x['shape']}" for i, x in enumerate(captured["tensors"])),
            *(f"{kind}: {', '.join(map(str, captured[kind]))}" for kind in ("ints", "floats") if captured[kind]),
        ]
        or ["nothing"],
        "Tiles": [
            f"{nQ:,} × {nKV:,} tiles of {tile_q} × {tile_kv} positions, {B * H} map{'s' * (B * H > 1)}",
            ", ".join(f"{num:,} {kind}" for kind, num in facts["tiles"].items()) + f": {facts['density']:.1%} visited",
            f"decided by {decided}",
        ],
        "Work": [
            f"visible pairs: {visible:,} of {pairs:,} ({visible / pairs:.1%}), {how}",
            f"forward: dense {_giga(flops['dense'])}, visited tiles {_giga(flops['visited'])} "
            f"({flops['visited'] / flops['dense']:.1%}), visible pairs {_giga(flops['visible'])}",
        ],
        "Memory of the map": [f"kinds {size['kinds']:,} bytes{walks}; together {size['total']:,}"],
        "Plan": [facts["plan"]["why"]],
        **{f"Triton function {_WHERE[name]}": text.splitlines() for name, text in facts["functions"].items()},
        "Picture": [*facts["picture"].splitlines(), *([f"drawn to {facts['drawn']}"] if "drawn" in facts else [])],
    }
    return "\n\n".join("\n    ".join([title, *lines]) for title, lines in sections.items())


_WHERE = {
    "hide": "of the attention kernels",
    "bounds": "of the kernel that makes the map",
    "mask": "of the same kernel, for tiles that bounds leave open",
}


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.4g} GFLOP"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
