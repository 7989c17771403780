"""Flash attention with any mask."""

from anymask.api import attention, block_map
from anymask.blocks.block_map import BlockMap
from anymask.errors import AnyMaskError, InputError, MaskError, UnsupportedError
from anymask.masks import (
    Mask,
    causal,
    document,
    from_function,
    full,
    mask_from,
    padding,
    prefix_lm,
    sliding_window,
)
from anymask.scores import ScoreMod, alibi, softcap

__all__ = [
    "AnyMaskError",
    "BlockMap",
    "InputError",
    "Mask",
    "MaskError",
    "ScoreMod",
    "UnsupportedError",
    "alibi",
    "attention",
    "block_map",
    "causal",
    "document",
    "from_function",
    "full",
    "mask_from",
    "padding",
    "prefix_lm",
    "sliding_window",
    "softcap",
]
