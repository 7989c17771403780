"""Train a small byte-level transformer on packed documents, and check that packing changed nothing.

    python examples/packed_training.py                   # the pictures go to demo-out/

Documents of different lengths are laid end to end in rows of equal length, so that no work is spent on padding. The
mask `causal() & document(ids)` keeps each document from seeing its neighbours. This program
1. packs the Python files of the standard library, one byte a token, and draws the mask of one row;
2. trains on the rows;
3. compares loss and gradients of packed rows with those of the same documents run one by one: they must be equal;
4. compares time and memory with PyTorch's scaled_dot_product_attention (SDPA) given the same mask as a tensor.
With a GPU the model is bigger and attention runs on the Triton kernels; without one, on tiles in plain PyTorch.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from anymask import alibi, attention, causal, document

IGNORE = -100  # the target of a document's last byte: what follows belongs to another document


@dataclass(frozen=True)
class Sizes:
    rows: int  # sequences a batch
    length: int  # tokens a sequence
    layers: int
    width: int
    heads: int
    steps: int
    # the attention that is compared with SDPA: one row of `compared` tokens
    compared: int
    dtype: torch.dtype
    tolerance: float  # largest difference allowed to SDPA, relative to the largest entry


CPU = Sizes(2, 4096, 2, 128, 4, 80, 8192, torch.float32, 1e-4)
GPU = Sizes(4, 16384, 8, 512, 8, 150, 16384, torch.bfloat16, 2e-2)


# ---- 1. real documents, packed


def source_files(longest: int) -> list[bytes]:
    """The standard library's Python files of at most `longest` bytes, in an order that is the same every time."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    texts = [path.read_bytes() for path in paths if 64 <= path.stat().st_size <= longest]
    random.Random(0).shuffle(texts)
    return texts


def pack(texts: list[bytes], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay the documents end to end and cut rows of `length` tokens: tokens [N, length], ids [N, length].

    ids says which document a token belongs to. A document that a cut divides goes on in the next row as a new one.
    """
    tokens = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8).long()
    ids = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor([len(text) for text in texts]))
    rows = len(tokens) // length
    return tokens[: rows * length].view(rows, length), ids[: rows * length].view(rows, length)


def targets_of(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The next byte of the same document, IGNORE after its last one: [N, length]."""
    targets = torch.full_like(tokens, IGNORE)
    targets[:, :-1] = torch.where(ids[:, 1:] == ids[:, :-1], tokens[:, 1:], IGNORE)
    return targets


# ---- 2. a transformer whose attention takes a mask


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, mask, score_mod):
        # each [B, heads, S, width / heads]: a view, attention takes any strides
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attention(q, k, v, mask=mask, score_mod=score_mod)
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ByteModel(nn.Module):
    """Bytes [B, S] -> logits [B, S, 256]. ALiBi tells the model how far back a key is, so no positions are needed."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.embed = nn.Embedding(256, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes.width, sizes.heads) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, 256, bias=False)
        self.register_buffer("slopes", torch.exp2(-torch.arange(1, sizes.heads + 1) * 8.0 / sizes.heads))

    def forward(self, tokens, mask):
        x = self.embed(tokens)
        score_mod = alibi(self.slopes)
        for block in self.blocks:
            x = block(x, mask, score_mod)
        return self.head(self.norm(x))


def total_loss(model, tokens, targets, mask):
    """The sum of the losses of all targets, so that losses of parts add up."""
    logits = model(tokens, mask).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def progress(done: int, total: int, note: str) -> None:
    """A bar that redraws itself on a terminal, and a line for every tenth part in a log."""
    if sys.stdout.isatty():
        filled = 40 * done // total
        print(f"\r[{'#' * filled}{'.' * (40 - filled)}] {done}/{total} {note} ", end="" if done < total else "\n")
    elif done * 10 // total > (done - 1) * 10 // total:
        print(f"{done}/{total} {note}")
    sys.stdout.flush()


def train(model, tokens, ids, sizes: Sizes, device: str) -> list[float]:
    """The mean loss of each step, in bits per byte."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 if device == "cpu" else 1e-3)
    shuffle = torch.Generator().manual_seed(0)
    losses: list[float] = []
    start = time.perf_counter()
    for step in range(sizes.steps):
        rows = torch.randint(len(tokens), (sizes.rows,), generator=shuffle)
        batch, batch_ids = tokens[rows].to(device), ids[rows].to(device)
        targets = targets_of(batch, batch_ids)
        mask = causal() & document(batch_ids)  # one mask for all layers: its block map is built once
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = total_loss(model, batch, targets, mask) / (targets != IGNORE).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item() / math.log(2))
        speed = (step + 1) * batch.numel() / (time.perf_counter() - start)
        progress(step + 1, sizes.steps, f"{losses[-1]:.2f} bits a byte, {speed:,.0f} tokens/s")
    return losses


# ---- 3. packed rows against the same documents one by one


def check_packing(model, tokens, ids, tolerance: float = 1e-4) -> None:
    """Loss and every gradient of the packed rows must equal those of the documents run one by one, in float32.

    Differences are relative: to the loss, and to the largest entry of each parameter's gradient.
    """
    targets = targets_of(tokens, ids)

    model.zero_grad()
    packed_loss = total_loss(model, tokens, targets, causal() & document(ids))
    packed_loss.backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    separate_loss, count = 0.0, 0
    for row_tokens, row_targets, row_ids in zip(tokens, targets, ids, strict=True):
        lengths = row_ids.unique_consecutive(return_counts=True)[1].tolist()
        for one, one_targets in zip(row_tokens.split(lengths), row_targets.split(lengths), strict=True):
            loss = total_loss(model, one[None], one_targets[None], causal())
            loss.backward()
            separate_loss += loss.item()
            count += 1
    differences = {
        name: ((packed[name] - parameter.grad).abs().max() / parameter.grad.abs().max()).item()
        for name, parameter in model.named_parameters()
    }
    model.zero_grad()
    worst = max(differences, key=differences.__getitem__)
    loss_difference = abs(packed_loss.item() - separate_loss) / separate_loss
    print(f"  {count} documents in {len(tokens)} rows")
    print(f"  loss packed {packed_loss.item():.4f}, one by one {separate_loss:.4f}: differs by {loss_difference:.1e}")
    print(f"  gradients differ by at most {differences[worst]:.1e} (in {worst}); allowed {tolerance:.0e} for both")
    if not max(loss_difference, differences[worst]) <= tolerance:
        raise SystemExit("the packed rows do not compute what the documents compute one by one")


# ---- 4. the same attention through SDPA with a dense mask


def peak_bytes(device: str) -> int:
    """The most memory this process has held at one time, on the GPU or in RAM."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage would also count the process that started this one
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(impl: str, ids_file: str, result_file: str, sizes: Sizes, device: str) -> None:
    """In a process of its own: time and peak memory of attention forward and backward with documents + causal."""
    torch.manual_seed(0)
    ids = torch.load(ids_file).to(device)
    shape = (1, 8, len(ids), 64)
    q, k, v = (torch.randn(shape, device=device, dtype=sizes.dtype, requires_grad=True) for _ in range(3))
    dout = torch.randn(shape, device=device, dtype=sizes.dtype)

    before = peak_bytes(device)
    if impl == "anymask":
        mask = causal() & document(ids)
    else:
        mask = torch.ones(len(ids), len(ids), dtype=torch.bool, device=device).tril_()
        mask &= ids[:, None] == ids

    def run():
        if impl == "anymask":
            out = attention(q, k, v, mask=mask)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        result = (out, *torch.autograd.grad(out, (q, k, v), dout))
        if device == "cuda":
            torch.cuda.synchronize()
        return [x.detach() for x in result]

    result = run()  # compiles, builds the block map
    peak = peak_bytes(device) - before
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.save(result, result_file)
    print(json.dumps({"seconds": sorted(times)[1], "peak": peak}))


def compare(ids: torch.Tensor, sizes: Sizes, device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(ids, f"{folder}/ids.pt")
        figures, results = {}, {}
        for impl in ("anymask", "sdpa"):
            command = [sys.executable, __file__, "--measure", impl, f"{folder}/ids.pt", f"{folder}/{impl}.pt"]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            figures[impl] = json.loads(answer.splitlines()[-1])
            results[impl] = [x.double().cpu() for x in torch.load(f"{folder}/{impl}.pt", map_location="cpu")]
    pairs = zip(results["anymask"], results["sdpa"], strict=True)
    difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    print(f"  {len(ids)} tokens, 8 heads of 64, {str(sizes.dtype)[6:]}, forward and backward")
    print(f"  out and gradients differ by at most {difference:.1e}; allowed {sizes.tolerance:.0e}")
    if not difference <= sizes.tolerance:
        raise SystemExit("AnyMask and SDPA disagree")
    for impl, name in (("anymask", "AnyMask"), ("sdpa", "SDPA, dense mask")):
        ms, mib = figures[impl]["seconds"] * 1e3, figures[impl]["peak"] / 2**20
        print(f"  {name:<17} {ms:9.1f} ms {mib:9.1f} MiB extra at the peak")
    ours, theirs = figures["anymask"], figures["sdpa"]
    longer, more = theirs["seconds"] / ours["seconds"], theirs["peak"] / ours["peak"]
    print(f"  SDPA takes {longer:.1f} times as long and {more:.1f} times the memory")


def draw_losses(path: Path, losses: list[float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, color="#0072b2")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (bits a byte)")
    axes.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the pictures")
    parser.add_argument("--steps", type=int, help=f"training steps: {CPU.steps} on a CPU, {GPU.steps} on a GPU")
    parser.add_argument("--measure", nargs=3, metavar=("IMPL", "IDS", "RESULT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = GPU if device == "cuda" else CPU
    if arguments.steps:
        sizes = replace(sizes, steps=arguments.steps)
    if arguments.measure:
        return measure(*arguments.measure, sizes, device)

    torch.manual_seed(0)
    arguments.out.mkdir(parents=True, exist_ok=True)

    texts = source_files(longest=sizes.length // 4)
    tokens, ids = pack(texts, sizes.length)
    print(
        f"1. {len(texts)} Python files, {tokens.numel():,} bytes, packed in {len(tokens)} rows of {sizes.length} tokens"
    )
    (causal() & document(ids[0])).draw(arguments.out / "mask.png", sizes.length, sizes.length)
    print(f"  the mask of the first row: {arguments.out / 'mask.png'}")

    model = ByteModel(sizes).to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"2. Training {parameters:,} parameters on the {device.upper()}, {sizes.rows} rows a step")
    losses = train(model, tokens, ids, sizes, device)
    draw_losses(arguments.out / "loss.png", losses)
    print(f"  the loss: {arguments.out / 'loss.png'}")

    print("3. Packed rows against the same documents one by one (float32, relative differences)")
    check_packing(model, tokens[:2].to(device), ids[:2].to(device))

    print("4. The same attention through SDPA (median of 3)")
    compare(ids.flatten()[: sizes.compared], sizes, device)


if __name__ == "__main__":
    main()
