"""Everything that knows Triton. Others call launch.py, map_launch.py, and plan.py, which imports no Triton."""
