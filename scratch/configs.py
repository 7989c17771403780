"""Time configs of AnyMask against the plan's choice, in turns after pauses, each checked first as gpu.py does.

    python scratch/configs.py [--only REGEX] [--names REGEX] [--rounds 5]       # needs an NVIDIA GPU; run from the root of the checkout

Prints a line a work, side and config: TFLOP/s (median, lowest, highest).
"""

# ruff: noqa: E402

import argparse
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path.cwd() / "benchmarks"), str(Path.cwd())]
import gpu

from anymask import attention

HALVES = {"BLOCK_Q": 128, "BLOCK_KV": 64, "num_stages": 4, "has_turns": False, "is_persistent": True}
WIDE = {"is_fused": True, "BLOCK_Q": 128, "num_stages": 2, "is_persistent": True}
PERSISTENT = {"dkdv": {"is_fused": True, "is_persistent": True}}
APART = {"is_fused": False, "has_turns": False}
LONE = {"is_fused": False, "num_consumers": 1, "num_stages": 2}
LONE_DQ = {"BLOCK_KV": 64, "num_v_stages": 1, "num_consumers": 1}
DQ = {"BLOCK_KV": 64, "num_v_stages": 3, "num_consumers": 2}
# by a regular expression of works: forward configs, backward ones
CONFIGS = [
    # 64 x 64 reads 2.27 GB of K and V through L2 in 280 us (documents 16k): is that what bounds it? Predicted: yes,
    # 452 -> 480 to 500 with halves, 256 documents 167 -> 200; without skipping (64 x 64 maps of 128 rows) less
    (
        r"document_causal_D128_S(16384|32768)|mode1_documents_D128_S16384",
        {
            "halves": {"forward": HALVES},
            "64x64": {"forward": HALVES | {"BLOCK_Q": 64, "num_stages": 2}},
            "64x64_3": {"forward": HALVES | {"BLOCK_Q": 64, "num_stages": 3}},
            "halves_3": {"forward": HALVES | {"num_stages": 3}},
            "128x128_no_turns": {"forward": HALVES | {"BLOCK_KV": 128, "num_stages": 2}},
            "128x128": {"forward": HALVES | {"BLOCK_KV": 128, "num_stages": 2, "has_turns": True}},
        },
        {
            "halves": {"dkdv": APART, "dq": DQ},
            "halves_dkdv": {"dkdv": APART},
            "fused": {"dkdv": {"is_fused": True}},
            "persistent": PERSISTENT,
        },
    ),
    (r"document_causal_D128_S65536|mode1_documents_D128_S65536|alibi|softcap", {}, {"persistent": PERSISTENT}),
    # the next tile of keys comes while this one's gradients leave: predicted 3 to 8% up to 2,048 tokens, 1% at 8,192
    (
        r"(full|causal)_D64_S(512|1024|2048|8192)",
        {},
        {"one_tile": {"dkdv": WIDE}, "two_tiles": {"dkdv": WIDE | {"num_key_tiles": 2}}},
    ),
    (
        r"causal_D64_S(512|1024)",
        {},
        {
            "64_two_tiles": {"dkdv": {"is_fused": True, "is_persistent": True, "num_key_tiles": 2}},
            "64": {"dkdv": {"is_fused": True, "BLOCK_Q": 64, "is_persistent": True}},
        },
    ),
]
# deterministic, against the plan's deterministic choice
DETERMINISTIC = [
    (r"(full|causal)_D64_S8192", {"wide": {"dkdv": {"is_fused": False, "BLOCK_Q": 128, "num_stages": 2}}}),
    (
        r"(full|causal)_D64_S(512|1024|2048)",
        {
            "64_apart": {"dkdv": {"is_fused": False}},
            "wide": {"dkdv": {"is_fused": False, "BLOCK_Q": 128, "num_stages": 2}},
        },
    ),
    (
        r"softcap",
        {
            "lone": {"dkdv": LONE, "dq": LONE_DQ},
            "lone_dkdv": {"dkdv": LONE, "dq": DQ | {"num_v_stages": 1}},
            "lone_dq": {"dkdv": {"is_fused": False}, "dq": LONE_DQ},
            "dq_128": {"dkdv": {"is_fused": False}, "dq": {"BLOCK_KV": 128, "num_v_stages": 2, "num_consumers": 2}},
            "dq_1_stage": {"dkdv": {"is_fused": False}, "dq": DQ | {"num_v_stages": 1}},
        },
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--names", default="", help="configs whose name matches this regular expression")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    gpu.ROUNDS = options.rounds
    jobs = [(works, "fwd", forward, False) for works, forward, _ in CONFIGS]
    jobs += [(works, "bwd", backward, False) for works, _, backward in CONFIGS]
    jobs += [(works, "bwd", backward, True) for works, backward in DETERMINISTIC]
    cases = [case for group in gpu.CASES.values() if group is not gpu.zoo for case in group()]
    for case in cases:
        if not re.search(options.only, case.work):
            continue
        gate = inputs = None
        for works, side, configs, deterministic in jobs:
            if not configs or not re.match(f"({works})($|_)", case.work):
                continue
            if gate is None:
                inputs = gpu.make_inputs(case)
                gate = gpu.Gate(case, inputs)
            calls = {}
            for name, config in {"plan": None, **configs}.items():
                if not re.search(options.names, name):
                    continue

                def run(q, k, v, config=config):
                    return attention(
                        q,
                        k,
                        v,
                        mask=case.mask,
                        score_mod=case.score_mod,
                        config=config,
                        deterministic=deterministic or None,
                        backend="gluon" if side == "fwd" else None,
                    )

                try:
                    gpu.check(run, inputs, gate)
                except Exception as error:
                    print(f"{case.work:36} {side} {name:18} {gpu.reason(error)}", flush=True)
                    continue
                if side == "fwd":
                    calls[name] = lambda run=run: run(*inputs[:3])
                else:
                    out = run(*inputs[:3])
                    calls[name] = lambda out=out: gpu.backward(out, inputs)
            flop = case.flop * (1 if side == "fwd" else 2.5)
            for name, (ms, (low, high)) in gpu.medians(calls).items():
                tflops = [round(flop / t * 1e-9, 1) for t in (ms, high, low)]
                what = "deterministic " * deterministic + name
                print(f"{case.work:36} {side} {what:32} {tflops[0]:7} ({tflops[1]} to {tflops[2]})", flush=True)


if __name__ == "__main__":
    main()
