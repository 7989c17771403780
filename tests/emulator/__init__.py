"""Runs the PTX that Triton compiles for a Hopper GPU on the CPU, warp by warp, and looks for races as it does."""
