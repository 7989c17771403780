"""The mask compiler: pure Python on torch, no Triton and no GPU."""
