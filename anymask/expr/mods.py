"""Mods: the two expressions of a call, parsed from the text that an op carries."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from anymask.errors import MaskError
from anymask.expr.bindings import Bindings
from anymask.expr.ir import SCORE, TRUE, DType, Expr, Op, const, from_text, wrap
from anymask.expr.simplify import rewrite, simplify

SEPARATOR = "\n--\n"


@dataclass(frozen=True)
class Mods:
    """mask: BOOL over b, h, q_idx, kv_idx, TRUE hides nothing.  score: FLOAT, also over score, SCORE is no change."""

    mask: Expr = TRUE
    score: Expr = SCORE

    @property
    def has_mask(self) -> bool:
        return self.mask is not TRUE

    @property
    def has_score(self) -> bool:
        return self.score is not SCORE

    @staticmethod
    def of(text: str, ints: tuple[int, ...] = (), floats: tuple[float, ...] = ()) -> Mods:
        """Parse `mask text -- score text` as trace() writes it, and simplify with the numbers that shape the code."""
        return _parse(text, ints, floats)

    @staticmethod
    def unbound(text: str) -> Mods:
        """Parse without the numbers, which then all stay NUMBER nodes: what can be said before they are known."""
        return _parse_unbound(text)

    @functools.cached_property
    def is_ragged(self) -> bool:
        """The mask reads captured tensors, as documents do: how much a row visits can differ much from row to row."""
        return any(node.op is Op.LOAD for node in self.mask.walk())

    @functools.cached_property
    def is_segmented(self) -> bool:
        """A query sees only keys whose captured number is as its own, as within documents: rows visit few tiles."""
        conditions = [self.mask]
        for node in conditions:  # which grows
            conditions += node.args if node.op is Op.AND else ()
        one_each = {frozenset(("q_idx",)), frozenset(("kv_idx",))}
        return any(
            node.op is Op.EQ
            and {arg.indices() & {"q_idx", "kv_idx"} for arg in node.args} == one_each
            and all(arg.slots() for arg in node.args)
            for node in conditions
        )

    @functools.cached_property
    def bare_reads(self) -> tuple[tuple[int, int, str], ...]:
        """(slot, dimension, index name) of each read of a captured tensor at an index as it is: ids[b, q_idx]."""
        return tuple(
            (int(node.value), dim, str(arg.value))  # type: ignore[arg-type]
            for node in dict.fromkeys((*self.mask.walk(), *self.score.walk()))
            if node.op is Op.LOAD
            for dim, arg in enumerate(node.args)
            if arg.op is Op.INDEX
        )


def text_of(mask: str, score: str) -> str:
    """Join two programs into the one text that an op carries."""
    return f"{mask}{SEPARATOR}{score}"


@functools.lru_cache(maxsize=4096)
def _parse_unbound(text: str) -> Mods:
    return Mods(*(from_text(part) for part in text.split(SEPARATOR)))


@functools.lru_cache(maxsize=4096)
def _parse(text: str, ints: tuple[int, ...], floats: tuple[float, ...]) -> Mods:
    unbound = _parse_unbound(text)
    return Mods(*(simplify(bind_structural(part, ints, floats)) for part in (unbound.mask, unbound.score)))


_SHAPES_THE_CODE = {Op.DIV: 1, Op.FLOORDIV: 1, Op.MOD: 1, Op.POW: 1, Op.SHL: 1, Op.SHR: 1}


def bind_structural(expr: Expr, ints: tuple[int, ...], floats: tuple[float, ...]) -> Expr:
    """Replace the captured numbers whose value decides what code is best: divisors, moduli, shifts, exponents, -1, 0,
    1.

    All other numbers stay arguments, so that changing them compiles nothing.
    """

    def value_of(node: Expr) -> int | float:
        slot = int(node.value)  # type: ignore[arg-type]
        if node.dtype is DType.FLOAT:
            return floats[slot]
        if wrap(ints[slot], node.dtype) != ints[slot]:
            raise MaskError(
                f"the captured number {ints[slot]} does not fit {node.dtype.value}: widen the index, q_idx.long()"
            )
        return ints[slot]

    def constant(node: Expr) -> Expr:
        if node.op is Op.CAST and node.args[0].op is Op.NUMBER:
            return const(value_of(node.args[0]), node.dtype)
        return const(value_of(node), node.dtype) if node.op is Op.NUMBER else node

    def rule(node: Expr) -> Expr:
        if node.op is Op.NUMBER and value_of(node) in (-1, 0, 1):
            return constant(node)
        position = _SHAPES_THE_CODE.get(node.op)
        if position is None:
            return node
        args = tuple(constant(arg) if i == position else arg for i, arg in enumerate(node.args))
        return Expr.of(node.op, node.dtype, args)

    return rewrite(expr, rule)


__all__ = ["Bindings", "Mods", "bind_structural", "text_of"]
