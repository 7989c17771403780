"""Tuning rows: data. A row is for an architecture family, an arithmetic and head dims up to max_D."""

from __future__ import annotations

from dataclasses import dataclass, replace


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

    has_turns: consumers issue their products in turns, so that one's softmax overlaps the others' products.
    is_persistent: a program for each multiprocessor, which takes one tile of queries after the other.
    """

    BLOCK_Q: int
    BLOCK_KV: int
    num_stages: int
    has_turns: bool
    is_persistent: bool = False

    @property
    def num_consumers(self) -> int:
        return self.BLOCK_Q // 64

    @property
    def programs_together(self) -> int:
        """That a multiprocessor has registers for; the producer counts as a warpgroup."""
        registers, _ = HOPPER_REGISTERS[self.num_consumers]
        return 65536 // (registers * 128 * (self.num_consumers + 1))

    def __str__(self) -> str:
        ways = ", in turns" * self.has_turns + ", persistent" * self.is_persistent
        return f"{self.BLOCK_Q}x{self.BLOCK_KV}, {_warpgroups(self)}{ways}, {self.num_stages} stages"


@dataclass(frozen=True)
class HopperBackwardConfig:
    """Of the Hopper kernel for dK and dV, by consumer warpgroups. num_stages: tiles of Q in shared memory.

    is_fused: it adds up dQ too, in whatever order its programs come. Else dQ has a kernel of its own.
    is_split: of the same 64 keys one warpgroup has S, P and dV, the other dP, dS and dK: registers do for both up to
    head dim 128 alone. Else each has both, of 64 keys of its own.
    num_consumers: 2, or, not fused, 1, of which a multiprocessor runs two programs at a time where they fit.
    BLOCK_Q: queries of a step, 64, or 128 with two consumers where head dims are up to 64.
    is_persistent: where it is fused: a program for each multiprocessor, which takes one tile of keys after the other.
    num_key_tiles: tiles of keys, with their values, in shared memory: 2 in a persistent program that has room for the
    next one's.
    """

    num_stages: int
    is_fused: bool
    is_split: bool = False
    num_consumers: int = 2
    BLOCK_Q: int = 64
    is_persistent: bool = False
    num_key_tiles: int = 1

    @property
    def BLOCK_KV(self) -> int:
        return 64 if self.is_split else 64 * self.num_consumers

    def __str__(self) -> str:
        ways = " and dq" * self.is_fused + f" in Gluon, {_warpgroups(self)}"
        ways += ", of dk and dv" * self.is_split + ", persistent" * self.is_persistent
        ways += ", 2 tiles of keys" * (self.num_key_tiles == 2)
        return f"{self.BLOCK_Q}x{self.BLOCK_KV}{ways}, {self.num_stages} stages"


@dataclass(frozen=True)
class HopperDqConfig:
    """Of the Hopper dQ kernel: 64 queries for each consumer warpgroup.

    num_v_stages: tiles of V in shared memory; of K, which is read until a step ends, there is one more.
    num_consumers: 2, or 1, of which a multiprocessor runs two programs at a time where they fit.
    """

    BLOCK_KV: int
    num_v_stages: int
    num_consumers: int = 2

    @property
    def BLOCK_Q(self) -> int:
        return 64 * self.num_consumers

    def __str__(self) -> str:
        return f"{self.BLOCK_Q}x{self.BLOCK_KV} in Gluon, {_warpgroups(self)}, {self.num_v_stages} stages of V"


def _warpgroups(config: HopperConfig | HopperBackwardConfig | HopperDqConfig) -> str:
    return f"{config.num_consumers} warpgroup" + "s" * (config.num_consumers > 1)


AnyConfig = Config | HopperConfig | HopperBackwardConfig | HopperDqConfig


@dataclass(frozen=True)
class Row:
    family: str
    arithmetic: str  # "half": 16-bit tensor cores; "tf32"; "ieee": float32 without tensor cores
    max_D: int  # of the padded max(D, Dv)
    forward: Config
    dkdv: Config
    dq: Config
    is_dense: bool = False  # only without a mask
    has_score: bool = False  # only with a score function


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

# Heads run together, rows with most work first, while what their programs read in common stays below the first number;
# the last heads while it stays below the second. Few heads keep keys in the L2 cache, many leave less of the GPU idle
# at the end, and there alone. By simulation (programs as they run, an L2 cache of 40 MB), idle at the end and MB of
# memory traffic: documents 16k by 8 MiB 11.0% 268, by 32 1.2% 269, by 64 0.7% 402, so 0.7% 269; 256 documents 1.7%
# 537, 0.3% 549, 0.8% 918 (an H200 read 847), so 0.3% 539; mode 1 16k 7.2% 269, 3.9% 369, 0.3% 637, so 0.3% 763 of the
# last 64 MiB. Under a regular mask 8 MiB leave 0.1%.
# H200, before: portable forward, 8 -> 32 MiB: documents 16k 435 -> 386 us, causal D 64 1462 -> 1509. One head at a time
# -> 8 MiB: causal 1218 -> 1155, no mask 2248 -> 2333. Hopper forward, 8 -> 16 -> 32 MiB, 2026-11-23, TFLOP/s: causal S
# 8192 D 128 617, 625, 599, D 96 533, 511, 511, S 1024 421, 398, 394.
REGULAR_BYTES = 8 << 20, 8 << 20
SEGMENTED_BYTES = 8 << 20, 32 << 20
RAGGED_BYTES = 8 << 20, 64 << 20
# But no fewer rows together than a GPU about runs at a time: with the 64 of one head of 8 MiB (D 256, S 8192) the last
# heads leave 10% of it idle. Forward 648 -> 710 TFLOP/s, backward 446 -> 464, 192/128 401 -> 413.
ROWS_TOGETHER = 128

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
    # sm_90: H200, bf16, 2026-11-22; S 8192 unless said. Kernel times in us of forward / dK/dV / dQ.
    # no mask 2440 / 4939 / 2635; forward 128 x 64 2611
    Row("sm_90", "half", 64, Config(64, 64, 4, 3), Config(64, 64, 4, 3), Config(64, 64, 4, 3), is_dense=True),
    # causal 1275 / 1949 / 1587, 16k tokens in 14 documents 461 / 630 / 522; forward 64 x 64 1438, 517; dK/dV
    # 32 x 64 2067, 709; dQ 128 x 64 1690, 744
    Row("sm_90", "half", 64, Config(128, 64, 4, 3), Config(64, 64, 4, 3), Config(64, 64, 4, 3)),
    # no mask 2151 / 3521 / 2510; dK/dV 32 x 64 3727
    Row("sm_90", "half", 128, Config(64, 64, 4, 3), Config(64, 128, 8, 3), Config(128, 64, 8, 3), is_dense=True),
    # dK/dV / dQ of softcap, causal 2503 / 2043, of ALiBi 2147 / 1349; dK/dV 32 x 64 2676, 2196
    Row("sm_90", "half", 128, Config(64, 64, 4, 3), Config(64, 128, 8, 3), Config(128, 64, 8, 3), has_score=True),
    # causal 1111 / 1899 / 1304, window 1024 of 32k 714 / 1236 / 904, documents 16k 381 / 668 / 464; dK/dV
    # 64 x 128 2089, 1372, 714
    Row("sm_90", "half", 128, Config(64, 64, 4, 3), Config(32, 64, 4, 3), Config(128, 64, 8, 3)),
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


def lookup(family: str, arithmetic: str, D: int, has_mask: bool, has_score: bool) -> Row:
    """The first row for this family ("any" fits all), arithmetic, padded head dim, mask and score function."""
    rows = sorted(ROWS, key=lambda row: row.family == "any")
    return next(
        row
        for row in rows
        if row.family in (family, "any")
        and row.arithmetic == arithmetic
        and row.max_D >= D
        and not (row.is_dense and has_mask)
        and row.has_score <= has_score
    )


@dataclass(frozen=True)
class HopperRow:
    """only: for "dense": no mask and no score function; "regular": a mask of indices alone or none, and no score
    function; "ragged": a mask that reads tensors, and no score function; "segmented": one as of documents
    (Mods.is_segmented); "costly": see is_costly of expr/emit.py. Of a mask of indices alone (blocks/sparsity.py):
    "fine": tiles of 128 x 128 hold more than 1.2 times the pairs that tiles of 64 x 64 do; "short": a query visits up
    to 640 keys in the latter, and there is no score function.
    """

    max_D: int  # of max(D, Dv)
    forward: HopperConfig
    only: str = ""
    min_Skv: int = 0
    max_Skv: int = 1 << 62
    max_Dv: int = 256
    max_Sq: int = 1 << 62


# H200, bf16, 16,384 tokens in all unless said, 2026-11-22. Numbers are TFLOP/s, no mask / causal, and of documents.
HOPPER_ROWS = (
    # us, 16 heads, S 16384, 2026-11-23: 64 x 64 / 64 x 128 / 192 x 128 / portable: window 64 88 / 88 / 121 / 101, 512
    # 142 / 141 / 174 / 178, 17 and sinks 85 / 114 / 199 / 113; a neighbourhood in 3-D 107 / 142 / 307 / 146; chunks of
    # 256 83 / 68 / 111 / 83
    HopperRow(64, HopperConfig(64, 64, 2, False, True), "fine"),
    HopperRow(64, HopperConfig(64, 128, 2, False, True), "short"),
    # S 16384 522 / 511, 4096 502 / 421, 1024 454 / 250, 512 400 / 177; not persistent 501 / 498, 475 / 406, 360 / 220,
    # 281 / 153 (all not in turns; S 8192, one after the other, in turns 529 / 486, not 523 / 470)
    HopperRow(64, HopperConfig(192, 128, 3, True, True), "dense"),
    HopperRow(64, HopperConfig(192, 128, 3, True, True), "regular", min_Skv=4096),
    # S 16384 452 / 442, 4096 443 / 416, 1024 434 / 328, 512 398 / 238, documents 326; 128 x 128 444 / 445, 443 / 429,
    # 416 / 327, 380 / 238, 283; the portable kernel 389 / 419, 410 / 279 (S 1024), 355 / 197 (S 512)
    HopperRow(64, HopperConfig(64, 128, 2, False, True)),
    # heads 32:8, 16 queries, 8,192 keys, 16 sequences: 260 us, 128 x 128 421; the portable kernel 299
    HopperRow(128, HopperConfig(64, 64, 2, False), max_Sq=64),
    # us, 16 heads, S 16384, 2026-11-23: 64 x 64 / 128 x 128 / portable: window 64 93 / 113 / 130, 128 96 / 109 / 144,
    # 256 121 / 137 / 176, 512 186 / 174 / 231, 17 and sinks 98 / 162 / 146; a neighbourhood in 3-D 121 / 261 / 171;
    # chunks of 24 91 / 116 / 123, 256 105 / 90 / 142; D 96 window 64 79 / 108 / 126, 512 158 / 155 / 245
    HopperRow(128, HopperConfig(64, 64, 2, False, True), "fine"),
    # slices 1216 / 1326 / 1574, S 4096 109 / 150 / 124; reads of keys before the first 4549 / 5118 / 5136
    HopperRow(128, HopperConfig(64, 64, 2, False, True), "costly"),
    # 128 x 128, 2026-11-23: documents of 128 tokens, 32k in all 182, 140; of 1,170 tokens 477, 488. Of 4,680 tokens,
    # 65k, before, 469, 545
    HopperRow(128, HopperConfig(64, 64, 2, False, True), "segmented", max_Skv=32768),
    # S 16384 639 / 613, 8192 640 / 610, 4096 609 / 597, 1024 617 / 452, 512 530 / 320; not persistent 653 / 627,
    # 624 / 606, 611 / 581, 532 / 380, 424 / 256; documents 421, 65k 545; 405, 532. On 2026-11-23 S 16384 658 / 655, not
    # persistent 658 / 641; window 1024 of 32k 480, 428; documents 65k 556, 543
    HopperRow(128, HopperConfig(128, 128, 2, True, True)),
    # S 8192, causal, portable kernel: 192/128 628, 331 (192/192); 256 606, 489. 160 not measured
    HopperRow(160, HopperConfig(128, 128, 2, True)),
    # us as above: 64 x 64 / 128 x 128 / portable, 192/128: window 64 111 / 150 / 197, 256 154 / 173 / 281, 512 218 /
    # 220 / 382, 17 and sinks 126 / 193 / 233; a neighbourhood in 3-D 158 / 312 / 272; chunks of 256 137 / 127 / 181
    HopperRow(192, HopperConfig(64, 64, 2, False), "fine", max_Dv=128),
    HopperRow(192, HopperConfig(128, 128, 2, True), max_Dv=128),
    HopperRow(192, HopperConfig(128, 64, 3, True)),
    HopperRow(256, HopperConfig(128, 64, 2, True)),
)


def hopper_config(D: int, Dv: int, Sq: int, Skv: int, tile_q: int, kinds: frozenset[str]) -> HopperConfig:
    """The forward's for maps with tiles of tile_q queries. kinds: what mask and score function are (HopperRow.only)."""
    max_D = min(row.max_D for row in HOPPER_ROWS if row.max_D >= max(D, Dv))
    return next(
        row.forward
        for row in HOPPER_ROWS
        if row.max_D == max_D
        and row.max_Dv >= Dv
        and row.min_Skv <= Skv <= row.max_Skv
        and Sq <= row.max_Sq
        and (not row.only or row.only in kinds)
        and max(row.forward.BLOCK_Q, tile_q) % min(row.forward.BLOCK_Q, tile_q) == 0
    )


# Of the Hopper backward, by the most that max(D, Dv) may be.
HOPPER_BACKWARD_STAGES = {64: 3, 128: 2, 192: 3, 256: 2}


def hopper_backward_default(D: int, Dv: int) -> HopperBackwardConfig:
    """What config= changes."""
    stages = next(n for max_D, n in HOPPER_BACKWARD_STAGES.items() if max_D >= max(D, Dv))
    is_split = max(D, Dv) > 128
    return HopperBackwardConfig(stages, is_fused=not is_split, is_split=is_split)


@dataclass(frozen=True)
class HopperBackwardRow:
    """For min_D <= D, Dv <= max_D.  only: as of HopperRow."""

    min_D: int
    max_D: int
    backward: HopperBackwardConfig
    min_length: int = 0  # of queries and of keys
    only: str = ""
    max_Skv: int = 1 << 62


LONE = HopperBackwardConfig(2, is_fused=False, num_consumers=1)
WIDE = HopperBackwardConfig(2, is_fused=True, BLOCK_Q=128, is_persistent=True)

# H200, bf16, 16,384 tokens in all, 2026-11-22. TFLOP/s, no mask / causal, all kernels of a backward; the portable ones.
HOPPER_BACKWARD_ROWS = (
    # us, 16 heads, S 16384, 2026-11-23: this / fused, persistent / portable: window 64 265 / 261 / 193, 256 270 / 279 /
    # 317, 17 and sinks 391 / 613 / 390; a neighbourhood in 3-D 285 / 296 / 284
    HopperBackwardRow(64, 64, LONE, 512, only="fine"),
    # TFLOP/s, two tiles of keys, and one, 2026-11-23, on the H200: S 512 353 / 229, 340 / 216 (64 queries a step 226,
    # 206); 1024 433 / 331, 420 / 321 (64: 323, 305); 2048 489 / 420, 475 / 415; 8192 520 / 524, 525 / 528
    HopperBackwardRow(64, 64, replace(WIDE, num_key_tiles=2), 512, only="regular", max_Skv=4096),
    # before, S 8192 491, 1024 375; 64 queries a step 461, 357; the portable one 368, 345. Persistent, and not,
    # 2026-11-23: 475, 477; 2048 417, 399; 1024 379, 364; 512 302, 275, the portable one 262. 128 and 64 queries a step:
    # causal S 16384 479, 461; 8192 480, 444; in six rounds each 4096 382 to 426, 291 to 403; 2048 336 to 375, 310 to
    # 355; 1024 266 to 277, 241 to 270; a window of 1,024 312 to 331, 290 to 322
    HopperBackwardRow(64, 64, WIDE, 512, only="regular"),
    # causal S 8192 461, 1024 267, 512 177; 128 queries a step 455, 272; the portable one 359, 249, 174
    HopperBackwardRow(64, 64, HopperBackwardConfig(3, is_fused=True), 1024),
    # deterministic; 128 queries a step and 64, 2026-11-23: S 8192 442 / 442, 418 / 423; 2048 410 / 332, 399 / 327; 1024
    # 356 / 249, 350 / 250, the portable one 360 / 250
    HopperBackwardRow(64, 64, HopperBackwardConfig(2, is_fused=False, BLOCK_Q=128), 2048, only="regular"),
    # causal S 8192 375, 1024 239; the portable one 346, 246
    HopperBackwardRow(64, 64, HopperBackwardConfig(3, is_fused=False), 2048),
    # D 48, S 8192, dq in its step: - / 290; - / 265. D 32 278 / 269; 281 / 267. D 16 156 / 158; 186 / 157
    HopperBackwardRow(40, 64, HopperBackwardConfig(3, is_fused=True), 2048),
    HopperBackwardRow(40, 96, LONE, only="segmented", max_Skv=32768),
    # us as below, D 96: window 64 249 / 305 / 374, 512 453 / 487 / 699
    HopperBackwardRow(40, 96, LONE, only="short"),
    # D 72 and 96 persistent, and not, 2026-11-23: causal 8192 373, 358; 460, 457
    HopperBackwardRow(40, 96, HopperBackwardConfig(2, is_fused=True, is_persistent=True), only="regular"),
    # S 8192, causal, D 72 and 96, 389 and 492, apart 350 and 431
    HopperBackwardRow(40, 96, HopperBackwardConfig(2, is_fused=True)),
    HopperBackwardRow(40, 96, HopperBackwardConfig(2, is_fused=False)),
    # 32k tokens in 256 documents 120, fused 93; 16k in 14 359, 361
    HopperBackwardRow(40, 128, LONE, only="segmented", max_Skv=32768),
    # us, 16 heads, S 16384, 2026-11-23: this / fused, persistent / portable: window 64 272 / 365 / 387, 256 375 / 438 /
    # 528, 512 497 / 578 / 724, 17 and sinks 569 / 1028 / 815; chunks of 256 328 / 358 / 406, 512 376 / 406 / 477; a
    # neighbourhood in 3-D 365 / 435 / 501. The sum of dQ takes 84 of fused
    HopperBackwardRow(40, 128, LONE, only="short"),
    # persistent, and not, 2026-11-23: S 8192 573 / 556, 551 / 550; 2048 - / 418, - / 402; 1024 425 / 313, 392 / 309;
    # 512 330 / 206, 312 / 198. Later that day, under masks that read tensors: mode 1 16k 589 / 591, 65k 614 / 597,
    # documents 65k 549 / 540; ALiBi 613 / 623, softcap 565 / 564
    HopperBackwardRow(40, 128, HopperBackwardConfig(2, is_fused=True, is_persistent=True), only="regular"),
    HopperBackwardRow(40, 128, HopperBackwardConfig(2, is_fused=True, is_persistent=True), only="ragged"),
    # S 16384 582 / -, 8192 572 / 577, 1024 - / 338; dq in its step 552 / -, 547 / 531, - / 328; three stages 586 / -,
    # 572 / 514
    HopperBackwardRow(40, 128, HopperBackwardConfig(2, is_fused=True)),
    # S 16384 515 / 530, 8192 529 / 497; before its consumers took turns 465 / 493, 472 / 477, S 2048 431 / 395, 512
    # 328 / 220
    HopperBackwardRow(40, 128, HopperBackwardConfig(2, is_fused=False)),
    # S 8192, causal, 192/128 421, 256 473; 160 with the portable kernels 72
    HopperBackwardRow(8, 192, HopperBackwardConfig(3, is_fused=False, is_split=True)),
    HopperBackwardRow(8, 256, HopperBackwardConfig(2, is_fused=False, is_split=True)),
)


def hopper_backward_config(
    D: int, Dv: int, length: int, Skv: int, is_deterministic: bool, kinds: frozenset[str]
) -> HopperBackwardConfig | None:
    """The backward's for length queries and keys at least; None where the portable one is faster, or not compared."""
    max_D = min(row.max_D for row in HOPPER_BACKWARD_ROWS if row.max_D >= max(D, Dv))
    for row in HOPPER_BACKWARD_ROWS:
        if (
            row.max_D == max_D
            and row.min_D <= min(D, Dv)
            and row.min_length <= length
            and Skv <= row.max_Skv
            and (not row.only or row.only in kinds)
            and not (row.backward.is_fused and is_deterministic)
        ):
            return row.backward
    return None


@dataclass(frozen=True)
class HopperDqRow:
    """only: as of HopperRow; "lone": beside one consumer for dk and dv."""

    max_D: int  # of max(D, Dv)
    dq: HopperDqConfig
    only: str = ""
    max_Skv: int = 1 << 62


# H200, bf16, S 8192, 2026-11-22. TFLOP/s of a whole backward, no mask at S 16384 / causal. Scores spill with 128 keys
# a step (softcap, D 128: 248 bytes).
HOPPER_DQ_ROWS = (
    HopperDqRow(128, HopperDqConfig(64, 1, num_consumers=1), "lone"),
    # the portable dQ 431 / 425, 64 keys 452 / 451; D 64 causal 375, the portable dQ 350, 64 keys 349
    HopperDqRow(128, HopperDqConfig(128, 2), "regular"),
    # two programs a multiprocessor
    HopperDqRow(128, HopperDqConfig(64, 1, num_consumers=1), "segmented", max_Skv=32768),
    # 16k tokens in 14 documents 325, 128 keys 323, the portable dQ 290
    HopperDqRow(128, HopperDqConfig(64, 3)),
    # causal 192/128 354, 160 365, 256 395; before, with the portable dQ, 232, 198, 260
    HopperDqRow(192, HopperDqConfig(64, 2)),
    HopperDqRow(256, HopperDqConfig(64, 1)),
)


def hopper_dq_config(D: int, Dv: int, Skv: int, kinds: frozenset[str]) -> HopperDqConfig:
    """The Hopper dQ's, for D and Dv up to 256. kinds: as of hopper_config."""
    return next(
        row.dq
        for row in HOPPER_DQ_ROWS
        if row.max_D >= max(D, Dv) and Skv <= row.max_Skv and (not row.only or row.only in kinds)
    )


# Registers a thread, by number of consumers: at entry, and of each role but the first (which gets what is left) after
# the register split.
HOPPER_REGISTERS = {1: (128, (24,)), 2: (168, (240, 24)), 3: (128, (160, 160, 24))}
