"""Everything that knows Triton; only launch.py is called from outside (and plan.py, which imports no Triton)."""
