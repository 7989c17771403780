"""Without a GPU, Triton kernels run in Triton's interpreter: to be set before anything imports a jitted function.

In CI the property tests draw the same examples each time, so that a submission is judged by its own change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

    import numpy as np
    from triton.runtime import interpreter

    def create_splat(self: Any, result_type: Any, scalar: Any) -> Any:
        # Triton 3.6 gives the result of a scalar float comparison the dtype of its operands, and so splats floats
        data = np.full(result_type.shape, scalar.data.reshape(-1)[0], dtype=scalar.data.dtype)
        return interpreter.TensorHandle(data, scalar.dtype.scalar)

    interpreter.InterpreterBuilder.create_splat = create_splat


@pytest.fixture
def poison() -> Iterator[None]:
    """torch.empty gives NaN, so that an element which no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1, device="cuda" if torch.cuda.is_available() else "cpu").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
