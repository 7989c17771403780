"""Runs the PTX that Triton compiles for a Hopper GPU on the CPU, warp by warp, and looks for races as it does.

    ptx.py          the text of a kernel as a list of instructions
    translate.py    those as a Python generator function, which a warp runs
    arithmetic.py   what instructions compute on 32 lanes
    memory.py       global memory: the tensors of a launch
    shadow.py       who may touch which word of shared memory: the race detector
    barriers.py     mbarriers and named barriers
    tma.py          tensor maps and their boxes
    tensor_core.py  wgmma: descriptors, swizzles, fragments
    machine.py      a block: its warps, their order, what goes on beside them
    launch.py       Emulator: within it, launches come here
    attention.py    forward and backward of the Hopper plan, by cases
    fuzz.py         random problems
    faults.py       small kernels with mistakes that must be found
    __main__.py     python -m tests.emulator --help

What it does not know: branches that differ within a warp (an error); lanes out of step within a warp; clusters; races
in global memory; accumulators that are read before their wgmma has been waited for (ptxas says so); the number of
registers; the rounding of .approx instructions, which is numpy's here, and of wgmma's sums; time. PTX that ptxas would
reject. An instruction that it does not know is an error.
"""
