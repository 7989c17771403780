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
class Row:
    family: str
    arithmetic: str  # "half": 16-bit tensor cores; "tf32"; "ieee": float32 without tensor cores
    max_D: int  # of the padded max(D, Dv)
    forward: Config
    dkdv: Config
    dq: Config


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
    # sm_90, H200: starting points taken from FlexAttention's rows, not yet measured here
    Row("sm_90", "half", 64, Config(64, 64, 4, 3), Config(64, 64, 4, 3), Config(64, 64, 4, 3)),
    Row("sm_90", "half", 128, Config(64, 64, 4, 3), Config(32, 64, 4, 3), Config(128, 64, 8, 3)),
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


def lookup(family: str, arithmetic: str, D: int) -> Row:
    """The first row for this family ("any" fits all), arithmetic and padded head dim."""
    rows = sorted(ROWS, key=lambda row: row.family == "any")
    return next(
        row for row in rows if row.family in (family, "any") and row.arithmetic == arithmetic and row.max_D >= D
    )
