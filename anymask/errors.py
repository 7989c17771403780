"""What AnyMask raises when a user's call is wrong: what was got, what was expected, what to try."""


class AnyMaskError(Exception):
    """Base class of every error that AnyMask raises on purpose."""


class InputError(AnyMaskError, ValueError):
    """A tensor or argument does not fit: shape, dtype, device, range."""


class MaskError(AnyMaskError, ValueError):  # not a TypeError: torch turns those into NotImplemented inside `==`
    """A mask or score function cannot be traced. Says where in the user's file, why, and what to write instead."""


class UnsupportedError(AnyMaskError, NotImplementedError):
    """A forced backend or config cannot do this problem. Nothing falls back silently: this is raised instead."""
