"""record: Triton aggregates without a constructor written out."""

from triton.experimental import gluon
from triton.language import constexpr, core


def record(cls):
    """An aggregate whose constructor takes the fields in their order. What is no value of a kernel is a constexpr."""
    names = tuple(cls.__annotations__)

    @gluon.constexpr_function
    def __init__(self, *values):
        for name, value in zip(names, values, strict=True):
            setattr(self, name, kernel_value(value))

    cls.__init__ = __init__
    return core._aggregate(cls)


@gluon.constexpr_function
def kernel_value(value):
    """value, which constexpr_function has unwrapped, as kernels have it."""
    if isinstance(value, core.tuple):
        return core.tuple([kernel_value(item) for item in value])
    return value if isinstance(value, core.base_value) else constexpr(value)
