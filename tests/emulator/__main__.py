"""Run cases on the emulator, and print a line for each.

    python -m tests.emulator                    the cases of tests/emulator/attention.py
    python -m tests.emulator --all              every mask and score function of the zoo, as on a GPU
    python -m tests.emulator --seeds 0 1 2 tree  those whose name has "tree", in three orders of events
    python -m tests.emulator --part 2/5         a part of them
    python -m tests.emulator --fuzz 100 200     random problems, from number 100 to 199
    python -m tests.emulator --faults           what the emulator must find, and compute
    python -m tests.emulator --list             names

It takes `anymask` and `tests` from the working directory. Exits with 1 where a case fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from typing import Any


def main() -> int:
    # before anything imports a jitted function
    os.environ.pop("TRITON_INTERPRET", None)
    import torch

    from tests.emulator.arithmetic import EmulatorError
    from tests.emulator.attention import CASES, zoo
    from tests.emulator.fuzz import problems

    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m tests.emulator", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="parts of names; all cases if there is none")
    parser.add_argument("--all", action="store_true", help="the zoo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--fuzz", type=int, nargs=2, metavar=("FIRST", "END"))
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--part", default="1/1", help="of the cases, such as 2/5")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    if options.faults:
        from tests.emulator.faults import check_faults

        complaints = check_faults()
        print("\n".join(complaints) or "all faults found, all products right")
        return bool(complaints)
    cases: dict[str, Any] = dict(zoo()) if options.all else CASES
    if options.fuzz:
        cases = dict(problems(range(*options.fuzz)))
    part, num_parts = map(int, options.part.split("/"))
    names = [name for name in cases if not options.names or any(some in name for some in options.names)]
    chosen = {name: cases[name] for name in names[part - 1 :: num_parts]}
    if options.list:
        print("\n".join(f"{name:28} {case}" for name, case in chosen.items()))
        return 0
    num_failed = 0
    for name, case in chosen.items():
        for seed in options.seeds:
            start = time.perf_counter()
            try:
                errors, emulator = case.run(seed)
                kernels = " ".join(f"{kernel.removesuffix('_kernel')}" for kernel, *_ in emulator.launches)
                verdict = " ".join(f"{what} {error:.1e}" for what, error in errors.items()) + f"  ({kernels})"
            except (EmulatorError, AssertionError) as error:
                num_failed += 1
                verdict = f"FAILED {type(error).__name__}: {error}\n    {case}"
            except Exception:
                num_failed += 1
                verdict = f"FAILED {traceback.format_exc()}    {case}"
            seconds = time.perf_counter() - start
            print(f"{name:28} seed {seed} {seconds:6.1f} s  {verdict}", flush=True)
    print(f"{len(chosen)} cases, {num_failed} failures")
    return min(num_failed, 1) if chosen else 1


if __name__ == "__main__":
    sys.exit(main())
