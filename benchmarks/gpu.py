"""AnyMask and its peers on one NVIDIA GPU: each result checked against float64, then timed.

    python benchmarks/gpu.py [group ...] [--out FILE.jsonl]        # --help lists the groups; all by default

Writes one JSON row per work and implementation, and prints a table at the end.

benchmarks/README.md says how work is counted and what each field means.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cases import MASKS, Sizes

from anymask import alibi, attention, causal, document, from_function, masks, sliding_window, softcap

DEVICE, DTYPE = "cuda", torch.bfloat16
# Largest error, in errors of plain torch in the same dtype: over a whole tensor, and over 128 rows of it, where plain
# torch's own largest error scatters more. The second finds a lost tile among small gradients.
ERROR_BUDGET, TILE_BUDGET = 2.0, 8.0
TENSORS = ("out", "dq", "dk", "dv")
SIDES = ("fwd", "bwd", "both")


class Wrong(Exception):
    """A result that is further from float64 than the budget allows. It is not timed."""


@dataclass(frozen=True)
class Case:
    """One work. visible and score say in plain torch what mask and score_mod say to AnyMask.

    is_causal, window and lengths (of documents) say it to the peers that have flags, intervals [2, S] to those that
    take the first key that a query sees, and the one after its last.
    """

    work: str
    B: int
    Hq: int
    Hkv: int
    S: int
    D: int
    pairs: int  # visible (query, key) pairs of one head of one sequence
    mask: Any = None
    visible: Callable | None = None  # (b, h, q_idx, kv_idx) -> bool
    score_mod: Any = None
    score: Callable | None = None  # (score, b, h, q_idx, kv_idx) -> score
    Dv: int = 0  # 0: D
    has_flags: bool = False  # SDPA and FlashAttention have this mask as a flag
    is_causal: bool = False
    window: int | None = None
    lengths: tuple[int, ...] | None = None
    intervals: torch.Tensor | None = None
    is_ours: bool = False  # of the zoo: no peer is given it, and pairs is what the mask shows, the mean over heads

    def __post_init__(self):
        object.__setattr__(self, "Dv", self.Dv or self.D)

    @property
    def flop(self) -> int:
        """Of the forward. The backward counts 2.5 times as much."""
        return 2 * self.B * self.Hq * (self.D + self.Dv) * self.pairs


# ---- the works: lengths and seeds of ../shared/peers/peers.py


def is_causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def full_case(work: str, B: int, Hq: int, Hkv: int, S: int, D: int) -> Case:
    return Case(work, B, Hq, Hkv, S, D, S * S, has_flags=True)


def causal_case(work: str, B: int, Hq: int, Hkv: int, S: int, D: int, **kw) -> Case:
    flags = {"has_flags": "score" not in kw, "is_causal": True}
    return Case(work, B, Hq, Hkv, S, D, S * (S + 1) // 2, causal(), is_causal, **flags, **kw)


def of_length(*lengths: int) -> Iterator[Case]:
    for D in (128, 64):
        for S in lengths:
            B, H = 16384 // S, 2048 // D
            yield full_case(f"full_D{D}_S{S}", B, H, H, S, D)
            yield causal_case(f"causal_D{D}_S{S}", B, H, H, S, D)


def dense() -> Iterator[Case]:
    yield from of_length(8192, 16384)


def short() -> Iterator[Case]:
    """Many short sequences: launches and ends."""
    yield from of_length(512, 1024, 2048)


def dims() -> Iterator[Case]:
    for D, Dv, H in ((72, 72, 16), (96, 96, 16), (192, 128, 16), (256, 256, 8)):
        yield causal_case(f"causal_D{D}_Dv{Dv}_S8192", 2, H, H, 8192, D, Dv=Dv)


def gqa() -> Iterator[Case]:
    yield causal_case("gqa32_8_causal_D128_S8192", 2, 32, 8, 8192, 128)


def document_lengths(S: int) -> list[int]:
    """Lognormal lengths that sum to S: 14 documents for the sizes used here."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < S:
        length = torch.empty(1).log_normal_(math.log(S // 16), 0.8, generator=generator)
        lengths.append(max(16, int(length.item())))
    lengths[-1] -= sum(lengths) - S
    return [n for n in lengths if n > 0]


def document_ids(lengths: list[int]) -> torch.Tensor:
    return masks.document_ids(torch.tensor([0, *lengths], device=DEVICE).cumsum(0), sum(lengths))


def document_bounds(lengths: list[int]) -> torch.Tensor:
    """[2, S]: where each token's document begins and ends."""
    n = torch.tensor(lengths)
    ends = n.cumsum(0)
    return torch.stack([ends - n, ends]).repeat_interleave(n, 1).to(DEVICE)


def positions(S: int) -> torch.Tensor:
    return torch.arange(S, device=DEVICE)


def documents_case(S: int, lengths: list[int] | None = None) -> Case:
    lengths = lengths or document_lengths(S)
    doc = document_ids(lengths)
    return Case(
        f"document_causal_D128_S{S}_n{len(lengths)}",
        *(1, 16, 16, S, 128),
        pairs=sum(n * (n + 1) // 2 for n in lengths),
        mask=causal() & document(doc),
        visible=lambda b, h, q_idx, kv_idx: (doc[q_idx] == doc[kv_idx]) & (q_idx >= kv_idx),
        is_causal=True,
        lengths=tuple(lengths),
        intervals=torch.stack([document_bounds(lengths)[0], positions(S) + 1]),
    )


def documents() -> Iterator[Case]:
    yield documents_case(16384)
    yield documents_case(65536)


def packs() -> Iterator[Case]:
    """256 short documents."""
    S = 32768
    cuts = torch.randperm(S - 1, generator=torch.Generator().manual_seed(1))[:255].sort().values + 1
    yield documents_case(S, torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([S])).tolist())


def mode1_case(S: int) -> Case:
    """Every fourth document sees everything, the others themselves."""
    lengths = document_lengths(S)
    doc = document_ids(lengths)
    eq = torch.where(doc % 4 == 0, doc, -1 - doc)

    def visible(b, h, q_idx, kv_idx):
        return (eq[q_idx] >= 0) | (eq[q_idx] == eq[kv_idx])

    pairs = sum(n * (S if i % 4 == 0 else n) for i, n in enumerate(lengths))
    everything = torch.tensor([[0], [S]], device=DEVICE)
    return Case(
        f"mode1_documents_D128_S{S}",
        *(1, 16, 16, S, 128),
        pairs=pairs,
        mask=from_function(visible),
        visible=visible,
        intervals=torch.where(eq >= 0, everything, document_bounds(lengths)),
    )


def mode1() -> Iterator[Case]:
    yield mode1_case(16384)
    yield mode1_case(65536)


def window() -> Iterator[Case]:
    S, W = 32768, 1024
    yield Case(
        f"window{W}_causal_D128_S{S}",
        *(1, 16, 16, S, 128),
        pairs=sum(min(i + 1, W) for i in range(S)),
        mask=sliding_window(W - 1, 0),
        visible=lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < W),
        is_causal=True,
        window=W,
        intervals=torch.stack([(positions(S) - W + 1).clamp_min(0), positions(S) + 1]),
    )


def scores() -> Iterator[Case]:
    size = (2, 16, 16, 8192, 128)
    slopes = torch.exp2(-torch.arange(1, 17, device=DEVICE) * 8.0 / 16)
    yield causal_case(
        "alibi_causal_D128_S8192",
        *size,
        score_mod=alibi(slopes),
        score=lambda s, b, h, q_idx, kv_idx: s + slopes[h] * (kv_idx - q_idx),
    )
    yield causal_case(
        "softcap_causal_D128_S8192",
        *size,
        score_mod=softcap(20.0),
        score=lambda s, b, h, q_idx, kv_idx: 20 * torch.tanh(s / 20),
    )


def zoo() -> Iterator[Case]:
    """Every mask of the tests but `nothing`: is the plan's choice ever slower than the portable kernels?"""
    S, H = 4096, 16
    for name in [name for name in MASKS if name != "nothing"]:
        mask = from_function(MASKS[name](Sizes(1, H, S, S, DEVICE)))
        # floats as in kernels: of 16 million pairs a few are so near a threshold that float64 decides otherwise
        shows = mask.to_dense(1, H, S, S, DEVICE, dtype=torch.float32)

        def visible(b, h, q_idx, kv_idx, shows=shows):
            return shows[b, h][q_idx, kv_idx]

        yield Case(f"zoo_{name}", 1, H, H, S, 128, int(shows.sum()) // H, mask, visible, is_ours=True)


CASES = {f.__name__: f for f in (dense, short, dims, gqa, documents, packs, mode1, window, scores, zoo)}


# ---- the implementations: Case -> fn(q, k, v) -> out, or None where one has no such mask


def provide_anymask(case: Case) -> Callable:
    return lambda q, k, v: attention(q, k, v, mask=case.mask, score_mod=case.score_mod)


def provide_anymask_deterministic(case: Case) -> Callable:
    return lambda q, k, v: attention(q, k, v, mask=case.mask, score_mod=case.score_mod, deterministic=True)


def provide_anymask_triton(case: Case) -> Callable:
    return lambda q, k, v: attention(q, k, v, mask=case.mask, score_mod=case.score_mod, backend="triton")


def provide_flex(case: Case, **options) -> Callable:
    blocks = None
    if case.visible is not None:
        blocks = create_block_mask(case.visible, None, None, case.S, case.S, device=DEVICE)
    flex = torch.compile(functools.partial(flex_attention, **options), dynamic=False)
    is_grouped = case.Hq != case.Hkv
    return lambda q, k, v: flex(q, k, v, score_mod=case.score, block_mask=blocks, enable_gqa=is_grouped)


def provide_flex_flash(case: Case) -> Callable | None:
    """FlexAttention on FlashAttention-4's kernels, for what those have no flag for."""
    return None if case.has_flags else provide_flex(case, kernel_options={"BACKEND": "FLASH"})


def provide_fa4(case: Case) -> Callable | None:
    """FlashAttention-4; documents by its variable lengths."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    flags: dict[str, Any] = {"causal": case.is_causal}
    if case.window:
        flags["window_size"] = (case.window - 1, 0)
    if case.lengths:
        bounds, longest = F.pad(torch.tensor(case.lengths).cumsum(0), (1, 0)).to(DEVICE, torch.int32), max(case.lengths)
        flags |= {f"cu_seqlens_{x}": bounds for x in "qk"} | {f"max_seqlen_{x}": longest for x in "qk"}

        def run(q, k, v):
            out = flash_attn_varlen_func(*(x[0].transpose(0, 1) for x in (q, k, v)), **flags)[0]
            return out.transpose(0, 1)[None]

        return run
    if not (case.has_flags or case.window):
        return None
    return lambda q, k, v: flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **flags)[0].transpose(1, 2)


def provide_cudnn_flex(case: Case) -> Callable | None:
    """cuDNN's flex attention, for which a user writes intervals of keys by hand."""
    from cudnn.flex_attention import create_mask_plan, flex_attn_func

    if case.intervals is None:
        return None
    # [1, 3, S]: a query sees the keys before the first number, and those from the second to the third
    first, end = case.intervals.int()
    intervals = torch.stack([torch.zeros_like(first), first, end])[None].contiguous()
    tokens_first = [x.detach().transpose(1, 2) for x in make_inputs(case)[:3]]
    plan = create_mask_plan(intervals, *tokens_first, build_backward=True)
    return lambda q, k, v: flex_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), mask_plan=plan).transpose(1, 2)


def provide_sdpa_cudnn(case: Case) -> Callable | None:
    if not case.has_flags:
        return None
    flags = {"is_causal": case.is_causal, "enable_gqa": case.Hq != case.Hkv}

    def run(q, k, v):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, **flags)

    return run


OURS = {
    "anymask": provide_anymask,
    "anymask_deterministic": provide_anymask_deterministic,
    "anymask_triton": provide_anymask_triton,
}
PEERS = {
    "flex": provide_flex,
    "sdpa_cudnn": provide_sdpa_cudnn,
}
if importlib.util.find_spec("flash_attn"):
    PEERS |= {"flex_flash": provide_flex_flash, "fa4": provide_fa4}
if importlib.util.find_spec("cudnn"):
    PEERS["cudnn_flex"] = provide_cudnn_flex
PROVIDERS = OURS | PEERS


# ---- the check


def make_inputs(case: Case) -> list[torch.Tensor]:
    """q, k [B, H, S, D] and v [B, H, S, Dv], which require grad, and dout [B, Hq, S, Dv]."""
    torch.manual_seed(0)
    sizes = ((case.Hq, case.D), (case.Hkv, case.D), (case.Hkv, case.Dv), (case.Hq, case.Dv))
    inputs = [torch.randn(case.B, H, case.S, D, device=DEVICE, dtype=DTYPE) for H, D in sizes]
    for x in inputs[:3]:
        x.requires_grad_()
    return inputs


def plain(case: Case, inputs: list[torch.Tensor], b: int, kv_head: int, dtype: torch.dtype, chunk: int = 1024) -> dict:
    """Plain torch attention and its gradients, for sequence b and the query heads of one kv_head.

    Works on `chunk` query rows at a time, so that memory grows with S and not with its square. Products
    are in dtype, the softmax in float32 or float64, as model code writes it. In float64 this is the truth.
    Returns float64 tensors out [G, S, Dv], dq [G, S, D], dk [S, D] and dv [S, Dv].
    """
    q, k, v, dout = inputs
    softmax_dtype = torch.promote_types(dtype, torch.float32)
    G = case.Hq // case.Hkv
    # float64 leaves, so that gradients add up over chunks and heads without rounding
    k_leaf, v_leaf = (x.detach()[b, kv_head].double().requires_grad_() for x in (k, v))
    kv_idx = torch.arange(case.S, device=q.device)
    out, dq = (torch.empty(G, case.S, D, device=q.device, dtype=torch.float64) for D in (case.Dv, case.D))
    for g in range(G):
        h, pairs = kv_head * G + g, 0
        for start in range(0, case.S, chunk):
            rows = slice(start, min(start + chunk, case.S))
            q_leaf = q.detach()[b, h, rows].double().requires_grad_()
            q_idx = kv_idx[rows, None]
            # [chunk, S]
            score = (q_leaf.to(dtype) @ k_leaf.to(dtype).T).to(softmax_dtype) * case.D**-0.5
            if case.score is not None:
                score = case.score(score, b, h, q_idx, kv_idx)
            if case.visible is not None:
                visible = case.visible(b, h, q_idx, kv_idx)
                has_key = visible.any(-1, keepdim=True)
                score = score.masked_fill(~visible & has_key, -math.inf)
                p = score.softmax(-1).masked_fill(~has_key, 0)
                pairs += int(visible.sum())
            else:
                p = score.softmax(-1)
                pairs += score.numel()
            result = p.to(dtype) @ v_leaf.to(dtype)
            result.backward(dout[b, h, rows].to(dtype))
            out[g, rows], dq[g, rows] = result.detach().double(), q_leaf.grad
        assert case.is_ours or pairs == case.pairs, (
            f"{case.work} counts {case.pairs} visible pairs, the mask has {pairs}"
        )
    rounded = lambda x: x.to(dtype).double()
    return {"out": out, "dq": dq, "dk": rounded(k_leaf.grad), "dv": rounded(v_leaf.grad)}


class Gate:
    """Holds results against float64 on the first and the last head, all rows and keys of them."""

    def __init__(self, case: Case, inputs: list[torch.Tensor]):
        self.G = case.Hq // case.Hkv
        self.heads = sorted({(0, 0), (case.B - 1, case.Hkv - 1)})
        self.exact = [plain(case, inputs, *head, torch.float64) for head in self.heads]
        low = [plain(case, inputs, *head, DTYPE) for head in self.heads]
        self.plain_errors = {x: self.tile_errors(x, low) for x in TENSORS}
        if not case.is_ours:  # whose last rows may see no key
            self.refuse_corruption()

    def tile_errors(self, name: str, results: list[dict]) -> torch.Tensor:
        """[num_heads, num_tiles]: the largest error of each 128 rows of each head checked."""
        errors = []
        for result, exact in zip(results, self.exact, strict=True):
            rows = (result[name].double() - exact[name]).abs().amax(-1)
            padded = F.pad(rows.reshape(-1, rows.shape[-1]), (0, -rows.shape[-1] % 128))
            errors.append(padded.unflatten(-1, (-1, 128)).amax(-1))
        return torch.cat(errors)

    def judge(self, results: list[dict]) -> dict[str, dict]:
        """The largest error of each tensor, and its ratio to plain torch's. Raises Wrong over a budget, or at a NaN."""
        errors, ratios = {}, {}
        for name in TENSORS:
            tiles, plain_tiles = self.tile_errors(name, results), self.plain_errors[name]
            errors[name] = tiles.max().item()
            ratios[name] = round(errors[name] / plain_tiles.max().item(), 3)
            if not ratios[name] <= ERROR_BUDGET:
                raise Wrong(f"{name} is off by {errors[name]:.3g}, {ratios[name]} times as much as plain torch")
            if not (tiles <= TILE_BUDGET * plain_tiles).all():
                raise Wrong(f"{name} is off in {int((~(tiles <= TILE_BUDGET * plain_tiles)).sum())} tiles of 128 rows")
        return {"max_error": errors, "error_over_plain": ratios}

    def check(self, out: torch.Tensor, grads: tuple[torch.Tensor, ...]) -> dict[str, dict]:
        """out [B, Hq, S, Dv] and (dq, dk, dv) of one implementation, whole."""
        dq, dk, dv = grads
        results = []
        for b, kv_head in self.heads:
            group = slice(kv_head * self.G, (kv_head + 1) * self.G)
            results.append(
                {"out": out.detach()[b, group], "dq": dq[b, group], "dk": dk[b, kv_head], "dv": dv[b, kv_head]}
            )
        return self.judge(results)

    def refuse_corruption(self) -> None:
        """The gate's own test: with sixteen rows of any one tensor lost it must say Wrong."""
        self.judge(self.exact)
        for name in TENSORS:
            corrupt = [dict(result) for result in self.exact]
            corrupt[-1][name] = corrupt[-1][name].clone()
            corrupt[-1][name][..., -16:, :] = 0
            try:
                self.judge(corrupt)
            except Wrong:
                continue
            raise AssertionError(f"the check lets a corrupted {name} pass")


# ---- measuring


def timed(fn: Callable) -> tuple[Any, float]:
    """fn's result and the seconds of this one call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = fn()
    torch.cuda.synchronize()
    return result, round(time.perf_counter() - start, 3)


ROUNDS = 3
PAUSE = 0.1  # seconds


def medians(fns: dict[str, Callable]) -> dict[str, tuple[float, list[float]]]:
    """Median and [lowest, highest] ms of each. They take turns, so that a GPU that heats up is unfair to none.

    Each begins after a pause: who works at the GPU's power limit (700 W of an H200) leaves a lower clock to the next
    one, and who follows a slower one finds a higher clock. H200, D 256, causal, forward: 687 to 763 TFLOP/s in nine
    turns without, 766 to 782 in six after a pause of 50 or 150 ms.
    """
    times: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(ROUNDS):
        for name, fn in fns.items():
            torch.cuda.synchronize()
            time.sleep(PAUSE)
            times[name].append(triton.testing.do_bench(fn, warmup=12, rep=30, return_mode="median"))
    return {name: (round(sorted(t)[ROUNDS // 2], 4), [round(min(t), 4), round(max(t), 4)]) for name, t in times.items()}


def peak_mib(fn: Callable) -> float:
    """The most GPU memory that fn holds at one time beyond what was there before, its results included."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def backward(out: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(out, inputs[:3], inputs[3], retain_graph=True)


def check(fn: Callable, inputs: list[torch.Tensor], gate: Gate) -> dict:
    """Errors, first calls and memory of one implementation. Raises Wrong."""
    out, first_fwd = timed(lambda: fn(*inputs[:3]))
    grads, first_bwd = timed(lambda: backward(out, inputs))
    errors = gate.check(out, grads)
    peak = peak_mib(lambda: backward(fn(*inputs[:3]), inputs))
    return {**errors, "first_fwd_s": first_fwd, "first_bwd_s": first_bwd, "peak_extra_mib": peak}


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:400]


def run_case(case: Case, impls: list[str]) -> list[dict]:
    """One row for each of these that has the work; `failed` says why one was not timed."""
    inputs = make_inputs(case)
    try:
        gate = Gate(case, inputs)
    except Exception as error:
        return [{"work": case.work, "impl": impl, "failed": f"no reference: {reason(error)}"} for impl in impls]
    rows, fns = {}, {}
    for impl in [impl for impl in impls if impl in OURS or not case.is_ours]:
        row = {"work": case.work, "impl": impl}
        try:
            fn = PROVIDERS[impl](case)
            if fn is None:
                continue
            row.update(check(fn, inputs, gate))
            fns[impl] = fn
        except Exception as error:
            row["failed"] = reason(error)
        rows[impl] = row
        torch.cuda.empty_cache()
    outs = {impl: fn(*inputs[:3]) for impl, fn in fns.items()}
    for side, flop, calls in (
        ("fwd", case.flop, {impl: lambda fn=fn: fn(*inputs[:3]) for impl, fn in fns.items()}),
        ("bwd", 2.5 * case.flop, {impl: lambda out=out: backward(out, inputs) for impl, out in outs.items()}),
        ("both", 3.5 * case.flop, {impl: lambda fn=fn: backward(fn(*inputs[:3]), inputs) for impl, fn in fns.items()}),
    ):
        times = medians(calls)
        for impl, (ms, spread) in times.items():
            row = rows[impl]
            row[f"{side}_ms"], row[f"{side}_spread_ms"], row[f"{side}_tflops"] = ms, spread, round(flop / ms * 1e-9, 1)
            if "flex" in times:
                row[f"{side}_speed_over_flex"] = round(times["flex"][0] / ms, 3)
            peers = {peer: times[peer][0] for peer in PEERS if peer in times}
            if "anymask_triton" in times:
                row[f"{side}_speed_over_triton"] = round(times["anymask_triton"][0] / ms, 3)
            if impl in OURS and peers:
                row[f"{side}_best_peer"] = best = min(peers, key=peers.__getitem__)
                row[f"{side}_speed_over_best"] = round(peers[best] / ms, 3)
    torch._dynamo.reset()
    return list(rows.values())


def first_call() -> list[dict]:
    """First call of a mask no cache knows, and the same in a second process, which finds the first one's files."""
    rows = []
    for impl in ("anymask", "anymask_triton", "flex"):
        with tempfile.TemporaryDirectory() as folder:
            env = {
                **os.environ,
                "TRITON_CACHE_DIR": f"{folder}/triton",
                "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            }
            for cache in ("cold", "warm"):
                row = {"work": "first_call_document_causal_D128_S16384", "impl": impl, "cache": cache}
                command = [sys.executable, __file__, "--first-call-of", impl]
                answer = subprocess.run(command, env=env, capture_output=True, text=True)
                if answer.returncode == 0:
                    row.update(json.loads(answer.stdout.splitlines()[-1]))
                else:
                    row["failed"] = answer.stderr.strip()[-400:]
                rows.append(row)
    return rows


def first_call_of(impl: str) -> None:
    """In a process of its own: trace, map, compile and run a mask, then its backward.

    wake_s is a forward and backward of another mask before it: what the process pays once, for importing and starting
    Triton, CUDA and autograd, and for the kernels that no mask is part of.
    """
    case = documents_case(16384)
    inputs = make_inputs(case)
    *qkv, dout = inputs
    other = causal_case("wake", 1, 16, 16, 16384, 128)
    _, wake_s = timed(lambda: backward(PROVIDERS[impl](other)(*qkv), inputs))
    out, forward_s = timed(lambda: PROVIDERS[impl](case)(*qkv))
    grads, backward_s = timed(lambda: torch.autograd.grad(out, qkv, dout))
    Gate(case, inputs).check(out, grads)
    print(json.dumps({"wake_s": wake_s, "first_fwd_s": forward_s, "first_bwd_s": backward_s}))


# ---- rows


def shell(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment() -> dict:
    folder = str(Path(__file__).parent)
    commit = shell("git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*")
    driver = shell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "commit": os.environ.get("ANYMASK_COMMIT", commit),
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.split("\n")[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def line_of(row: dict) -> str:
    start = f"{row['work']:<40} {row['impl']:<21}"
    if "failed" in row:
        return f"{start} {row['failed']}"
    if "fwd_ms" not in row:
        return f"{start} " + "  ".join(f"{key} {value}" for key, value in row.items() if key not in ("work", "impl"))
    over = " ".join(
        f"{row.get(f'{side}_speed_over_{peer}', math.nan):5.2f}" for peer in ("flex", "best") for side in SIDES
    )
    best = " / ".join(dict.fromkeys(row[f"{side}_best_peer"] for side in SIDES if f"{side}_best_peer" in row))
    return (
        f"{start} {row['fwd_ms']:9.3f} {row['bwd_ms']:9.3f} {row['both_ms']:9.3f} "
        f"{row['fwd_tflops']:8.1f} {row['bwd_tflops']:7.1f} {row['both_tflops']:7.1f}   "
        f"{over} {max(row['error_over_plain'].values()):6.2f} {row['peak_extra_mib']:9.1f} {best}"
    )


HEADER = (
    f"{'work':<40} {'impl':<21} {'fwd ms':>9} {'bwd ms':>9} {'both ms':>9} {'TFLOP/s':>8} {'bwd':>7} {'both':>7}   "
    f"{'x flex':>6} {'bwd':>4} {'both':>5} {'x best':>6} {'bwd':>4} {'both':>5} {'err':>6} {'peak MiB':>9} best peer"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = [*CASES, "first_call"]
    parser.add_argument("groups", nargs="*", metavar="group", help=f"which works: {', '.join(groups)}; all by default")
    parser.add_argument("--only", default="", help="works whose name matches this regular expression")
    parser.add_argument("--impls", nargs="+", choices=PROVIDERS, default=list(PROVIDERS), help="all by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.jsonl")
    parser.add_argument("--first-call-of", choices=PROVIDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.groups) - set(groups):
        parser.error(f"no group {', '.join(sorted(unknown))}; there are {', '.join(groups)}")
    if not torch.cuda.is_available():
        parser.error("this benchmark needs an NVIDIA GPU")
    if arguments.first_call_of:
        return first_call_of(arguments.first_call_of)

    common = environment()
    print(json.dumps(common), flush=True)
    rows: list[dict] = []
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w") as file:

        def keep(new: list[dict]) -> None:
            for row in new:
                print(line_of(row), flush=True)
                file.write(json.dumps({**row, **common}) + "\n")
            file.flush()
            rows.extend(new)

        for group in arguments.groups or groups:
            if group in CASES:
                for case in CASES[group]():
                    if re.search(arguments.only, case.work):
                        keep(run_case(case, arguments.impls))
            else:
                keep(first_call())
    print(f"\n{HEADER}")
    for row in rows:
        print(line_of(row))
    failed = [row for row in rows if "failed" in row and row["impl"] in OURS]
    if failed:
        raise SystemExit(f"{len(failed)} rows of AnyMask failed")


if __name__ == "__main__":
    main()
