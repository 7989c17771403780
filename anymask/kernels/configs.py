"""Tuning rows: data. A row is for an architecture family, an arithmetic and head dims up to max_D."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Tile sizes of one kernel, and how the compiler runs it. num_stages: depth of the software pipeline."""

    BLOCK_Q: int
    BLOCK_KV: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.BLOCK_Q}x{self.BLOCK_KV}, {self.num_warps} warps, {self.num_stages} stages"


@dataclass(frozen=True)
class HopperConfig:
    """Tiles of the Hopper forward: 64 queries for each consumer warpgroup. num_stages: tiles of keys in shared memory.

    has_turns: two consumers issue their products in turns, so that one's softmax overlaps the other's products.
    """

    BLOCK_Q: int
    BLOCK_KV: int
    num_stages: int
    has_turns: bool

    @property
    def num_consumers(self) -> int:
        return self.BLOCK_Q // 64

    def __str__(self) -> str:
        turns = ", in turns" if self.has_turns else ""
        return f"{self.BLOCK_Q}x{self.BLOCK_KV}, {self.num_consumers} warpgroups{turns}, {self.num_stages} stages"


@dataclass(frozen=True)
class Row:
    family: str
    arithmetic: str  # "half": 16-bit tensor cores; "tf32"; "ieee": float32 without tensor cores
    max_D: int  # of the padded max(D, Dv)
    forward: Config
    dkdv: Config
    dq: Config
    is_ragged: bool = False  # only for masks that read tensors, as documents do, of lengths up to max_S
    max_S: int = 1 << 62


# Shared memory that one program may use, in bytes.
SHARED_LIMITS = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
    "interpreter": 1 << 30,
}

# Heads run together, rows with most work first, while what their programs read in common stays below this. Many heads
# leave less of the GPU idle at the end, few keep keys in the L2 cache. H200, 8 -> 32 MiB, forward: documents 16k 435 ->
# 386 us, causal D 64 1462 -> 1509. One head at a time -> 8 MiB: causal 1218 -> 1155, no mask 2248 -> 2333.
RAGGED_BYTES, REGULAR_BYTES = 32 << 20, 8 << 20

# Architectures that are as another family in what matters here.
FAMILIES = {
    "sm_87": "sm_80",
    "sm_89": "sm_86",
    "sm_103": "sm_100",
    "sm_110": "sm_120",
    "sm_121": "sm_120",
}


# fmt: off
ROWS = (
    # sm_90: H200, bf16, S 8192, 2026-11-22. Numbers are TFLOP/s of forward / dK/dV / dQ by what each computes.
    # causal 415 / 479 / 572; forward 128 x 64 391, dK/dV 64 x 128 with 8 warps 389, dQ 128 x 64 with 8 warps 430
    Row("sm_90", "half", 64, Config(64, 64, 4, 3), Config(64, 64, 4, 3), Config(64, 64, 4, 3)),
    # 16k tokens in 14 documents 386 / 609 / 446 us, dK/dV as in the next row 714: short rows need two programs an SM
    Row("sm_90", "half", 128, Config(64, 64, 4, 3), Config(32, 64, 4, 3), Config(128, 64, 8, 3), True, 32768),
    # no mask 515 / 630 / 660; causal 458 / 560 / 640, dK/dV 32 x 64 with 4 warps 520, dQ 64 x 64 with 4 warps 580
    Row("sm_90", "half", 128, Config(64, 64, 4, 3), Config(64, 128, 8, 3), Config(128, 64, 8, 3)),
    # not tuned
    Row("sm_90", "half", 256, Config(128, 64, 8, 2), Config(64, 64, 8, 1), Config(64, 64, 8, 2)),
    Row("sm_90", "tf32", 64, Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 64, 4, 2)),
    Row("sm_90", "tf32", 128, Config(128, 32, 8, 2), Config(32, 64, 8, 2), Config(64, 32, 4, 2)),
    Row("sm_90", "tf32", 256, Config(64, 32, 4, 2), Config(32, 32, 8, 1), Config(64, 32, 8, 1)),

    # not measured: no such device at hand
    Row("sm_100", "half", 64, Config(128, 128, 8, 3), Config(64, 128, 8, 3), Config(128, 64, 8, 3)),
    Row("sm_100", "half", 128, Config(128, 64, 8, 3), Config(64, 128, 8, 2), Config(128, 64, 8, 2)),
    Row("sm_100", "half", 256, Config(64, 64, 4, 2), Config(64, 64, 8, 1), Config(64, 64, 8, 1)),
    Row("sm_80", "half", 64, Config(64, 64, 4, 3), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    Row("sm_80", "half", 128, Config(128, 64, 8, 3), Config(64, 64, 8, 2), Config(64, 64, 8, 2)),
    Row("sm_80", "half", 256, Config(64, 32, 4, 2), Config(32, 64, 8, 1), Config(64, 32, 8, 1)),
    Row("sm_86", "half", 64, Config(64, 64, 4, 3), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    Row("sm_86", "half", 128, Config(128, 32, 8, 2), Config(32, 64, 8, 2), Config(64, 32, 8, 2)),
    Row("sm_86", "half", 256, Config(64, 32, 4, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    Row("sm_120", "half", 64, Config(64, 64, 4, 3), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    Row("sm_120", "half", 128, Config(128, 32, 8, 2), Config(32, 64, 8, 2), Config(64, 32, 8, 2)),
    Row("sm_120", "half", 256, Config(64, 32, 4, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    Row("gfx942", "half", 64, Config(128, 64, 4, 1), Config(64, 64, 4, 1), Config(64, 64, 4, 1)),
    Row("gfx942", "half", 128, Config(128, 64, 4, 1), Config(32, 64, 4, 1), Config(64, 32, 4, 1)),
    Row("gfx942", "half", 256, Config(64, 32, 4, 1), Config(16, 32, 4, 1), Config(32, 16, 4, 1)),

    Row("any", "tf32", 64, Config(64, 64, 4, 2), Config(32, 64, 4, 2), Config(64, 32, 4, 2)),
    Row("any", "tf32", 128, Config(64, 32, 4, 2), Config(32, 32, 4, 2), Config(32, 32, 4, 2)),
    Row("any", "tf32", 256, Config(32, 32, 4, 1), Config(16, 32, 4, 1), Config(32, 16, 4, 1)),
    # without tensor cores a thread multiplies whole rows that it holds in registers: small tiles, many threads
    Row("any", "ieee", 64, Config(64, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    Row("any", "ieee", 128, Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    Row("any", "ieee", 256, Config(16, 32, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
    # big tiles: the interpreter's cost is per operation
    Row("interpreter", "half", 256, Config(64, 64, 4, 1), Config(64, 64, 4, 1), Config(64, 64, 4, 1)),
    Row("interpreter", "ieee", 256, Config(64, 64, 4, 1), Config(64, 64, 4, 1), Config(64, 64, 4, 1)),
)
# fmt: on


def lookup(family: str, arithmetic: str, D: int, is_ragged: bool, S: int) -> Row:
    """The first row for this family ("any" fits all), arithmetic, padded head dim, mask and longer length."""
    rows = sorted(ROWS, key=lambda row: row.family == "any")
    return next(
        row
        for row in rows
        if row.family in (family, "any")
        and row.arithmetic == arithmetic
        and row.max_D >= D
        and row.is_ragged <= is_ragged
        and row.max_S >= S
    )


@dataclass(frozen=True)
class HopperRow:
    max_D: int  # of max(D, Dv)
    forward: HopperConfig


# Numbers are TFLOP/s of the prototype (H200, bf16, S 16384, 2026-11): no mask / causal.
HOPPER_ROWS = (
    # 460 / 432
    HopperRow(64, HopperConfig(128, 128, 3, True)),
    # 645 / 637; without turns 639 / 630
    HopperRow(128, HopperConfig(128, 128, 2, True)),
)

# Registers a thread, by number of consumers: at entry, and of each role but the first (which gets what is left) after
# the register split.
HOPPER_REGISTERS = {2: (168, (240, 24)), 3: (128, (160, 160, 24))}
