"""program_of(kernel): a PTX kernel as one Python generator function, which a warp runs.

A register is a local variable that holds an array of 32 lanes. PTX gives registers a size but no type: each has the
type ("home") that most instructions want, others view it. Basic blocks are the branches of a loop over `pc`; branches
must be the same for all lanes of a warp. Where the warp may have to wait, or others may get their turn, it yields.
The accumulators of a chain of wgmma stay one array until somebody reads a register.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.emulator import arithmetic
from tests.emulator.ptx import Address, Instruction, Kernel, Operand, Place

# By the type of an instruction. "b" types say nothing about how bits are read: integers.
DTYPES = {
    f"{ptx}{bits}": f"{letter}{bits // 8}" for bits in (8, 16, 32, 64) for ptx, letter in zip("sub", "iui", strict=True)
}
DTYPES |= {"f32": "f4", "f64": "f8", "f16": "f2", "pred": "pred"}
SIZES = {"b16": 2, "b32": 4, "b64": 8, "f32": 4, "f64": 8, "u16": 2, "u32": 4, "s32": 4, "u64": 8, "s64": 8}

COMPARISONS = {"eq": "{} == {}", "ne": "{} != {}", "lt": "{} < {}", "le": "{} <= {}", "gt": "{} > {}", "ge": "{} >= {}"}
# of floats: with a NaN no comparison holds, but for those that end in u, which all do
DIFFER = "({0} < {1}) | ({0} > {1})"
FLOAT_COMPARISONS = COMPARISONS | {"ne": DIFFER, "neu": "{} != {}", "equ": f"~({DIFFER})"}
FLOAT_COMPARISONS |= {"ltu": "~({} >= {})", "leu": "~({} > {})", "gtu": "~({} <= {})", "geu": "~({} < {})"}
# opcodes without their type: the operands all have it, and so has the result
SIMPLE = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "mul.rn": "{} * {}",
    "mul.lo": "{} * {}",
    "mul.hi": "mul_hi({}, {})",
    "mad.lo": "{} * {} + {}",
    "fma.rn": "fma({}, {}, {})",
    "fma.rn.ftz": "flushed(fma({}, {}, {}))",
    "neg": "-{}",
    "abs": "np.abs({})",
    "not": "~{}",
    "and": "{} & {}",
    "or": "{} | {}",
    "xor": "{} ^ {}",
    "shl": "{} << {}",
    "shr": "{} >> {}",
    "div": "div({}, {})",
    "rem": "rem({}, {})",
    "div.full": "{} / {}",
    "rcp.approx.ftz": "flushed(ONE / {})",
    "ex2.approx": "np.exp2({})",
    "sqrt.rn": "np.sqrt({})",
    "ex2.approx.ftz": "flushed(np.exp2({}))",
    "selp": "np.where({2}, {0}, {1})",
    "lop3": "lop3({}, {}, {}, {})",
    "prmt": "prmt({}, {}, {})",
    "popc": "np.bitwise_count({}).astype(i4)",
    "bfe": "bfe({}, {}, {})",
}
# Parameter i is at (i + 1) times as many: an address that lies in no tensor.
PARAMETER_BYTES = 128
# no part of the work: the number of registers, and what a warp here does anyway, its lanes being in step
NOTHING = ("setmaxnreg.inc", "setmaxnreg.dec", "bar.warp.sync", "wgmma.fence")
FENCES = ("fence.proxy.async.shared::cta", "fence.proxy.async")


@dataclass(frozen=True)
class Program:
    """run(warp) is the generator.  places: of instructions by number.  of_line: the instruction of each line of it."""

    kernel: Kernel
    run: Callable[[Any], Any]
    places: list[Place]
    of_line: list[Instruction]
    text: str


def program_of(kernel: Kernel) -> Program:
    first = _Writer(kernel, {})
    first.write()
    second = _Writer(kernel, first.homes())
    second.write()
    text = "\n".join(second.lines)
    namespace: dict[str, Any] = dict(vars(arithmetic)) | second.constants
    exec(compile(text, f"<{kernel.name}>", "exec"), namespace)
    return Program(kernel, namespace["program"], second.places, second.of_line, text)


class _Writer:
    """Writes the function; without homes the first time, to see which types instructions want."""

    def __init__(self, kernel: Kernel, homes: dict[str, str]) -> None:
        self.kernel, self.known_homes = kernel, homes
        self.votes: dict[str, Counter[str]] = {}
        self.parent: dict[str, str] = {}  # registers that moves connect have one home
        self.lines: list[str] = []
        self.of_line: list[Instruction] = []
        self.places: list[Place] = []
        self.constants: dict[str, Any] = {}
        self.packed: dict[tuple[str, ...], str] = {}  # accumulators by their registers
        self.registers: dict[str, None] = {}
        self.now = Instruction("start", (), "", False, Place(0, "the start"))
        self.indent = "            "

    # --- registers

    def homes(self) -> dict[str, str]:
        votes: dict[str, Counter[str]] = {}
        for register, counts in self.votes.items():
            votes.setdefault(self._root(register), Counter()).update(counts)
        return {
            register: max(votes[self._root(register)].items(), key=lambda item: item[1])[0]
            for register in self.registers
            if self._root(register) in votes
        }

    def _root(self, register: str) -> str:
        while register in self.parent:
            register = self.parent[register]
        return register

    def join(self, *operands: Operand) -> None:
        """These have one home, if it can be."""
        roots = list(
            dict.fromkeys(self._root(x) for x in operands if isinstance(x, str) and self.kernel.is_register(x))
        )
        for root in roots[1:]:
            self.parent[root] = roots[0]

    def home(self, register: str) -> str:
        self.registers[register] = None
        kind = self.kernel.type_of(register)
        if kind == "pred":
            return "pred"
        return self.known_homes.get(register, DTYPES[kind])

    def vote(self, register: str, dtype: str) -> None:
        """An instruction wants it so."""
        if dtype not in ("", "pred") and dtype[1] == self.home(register)[1]:
            self.votes.setdefault(register, Counter())[dtype] += 1

    def variable(self, register: str) -> str:
        return register.replace("%", "") if register.startswith("%") else f"local_{register}"

    def value(self, operand: Operand, dtype: str) -> str:
        """The expression of an operand as such an array. dtype: "" for whatever it is."""
        assert isinstance(operand, str), operand
        if operand.startswith("!"):
            return f"~{self.value(operand[1:], dtype)}"
        if not self.kernel.is_register(operand):
            return self.constant(operand, dtype)
        self.unpack(operand)
        home = self.home(operand)
        self.vote(operand, dtype)
        name = self.variable(operand)
        if not dtype or dtype == home or dtype == "pred":
            return name
        size, wanted = int(home[1]), int(dtype[1])
        if size == wanted:
            return f"{name}.view({dtype})"
        assert wanted < size, (str(self.now), dtype)
        return f"{name}.astype({dtype})"  # the lower bits

    def constant(self, text: str, dtype: str) -> str:
        special = {"%laneid": "LANES", "%tid.x": "w.thread"}
        special |= {f"%ctaid.{axis}": f"w.block_{axis}" for axis in "xyz"}
        special |= {f"%nctaid.{axis}": f"w.grid_{axis}" for axis in "xyz"}
        special |= {"%tid.y": "ZERO", "%tid.z": "ZERO"}
        if text in special:
            return special[text]
        if found := re.match(r"global_smem(?:\+(\d+))?$", text):
            text = found[1] or "0"
        if found := re.match(r"0f([0-9A-Fa-f]{8})$", text):
            bits, kind = int(found[1], 16), "u4"
        elif found := re.match(r"0d([0-9A-Fa-f]{16})$", text):
            bits, kind = int(found[1], 16), "u8"
        elif found := re.match(r"-?(0x[0-9A-Fa-f]+|\d+)U?$", text):
            if dtype == "pred":
                return "TRUE" if int(text, 0) else "FALSE"
            kind = f"u{dtype[1]}" if dtype else "u4"
            bits = int(text.rstrip("U"), 0) % 2 ** (8 * int(kind[1]))
        else:
            raise NotImplementedError(f"operand {text} of {self.now}")
        name = f"c_{dtype or kind}_{bits:x}"
        array = np.full(32, bits, kind).view(dtype or kind)
        array.flags.writeable = False
        self.constants[name] = array
        return name

    def number(self, operand: Operand) -> int:
        assert isinstance(operand, str)
        return int(operand, 0)

    def uniform(self, operand: Operand) -> str:
        """A number that all lanes have."""
        assert isinstance(operand, str)
        if not self.kernel.is_register(operand):
            return str(int(operand, 0))
        return f"uniform({self.value(operand, 'i4')})"

    @property
    def at(self) -> int:
        """The number of the instruction that is written."""
        return len(self.places) - 1

    def guard(self) -> str:
        """The lanes that take part, or None."""
        if not self.now.guard:
            return "None"
        return f"{'~' * self.now.is_negated}{self.value(self.now.guard, 'pred')}"

    def assign(self, operand: Operand, expression: str, dtype: str) -> None:
        assert isinstance(operand, str), str(self.now)
        if operand == "_":
            return
        self.unpack(operand)
        home = self.home(operand)
        self.vote(operand, dtype)
        if dtype not in ("", "pred", home):
            same = dtype[1] == home[1]
            expression = f"({expression}).view({home})" if same else f"({expression}).astype({home})"
        if self.now.guard:
            expression = f"np.where({self.guard()}, {expression}, {self.variable(operand)})"
        self.line(f"{self.variable(operand)} = {expression}")

    def unpack(self, register: str) -> None:
        for registers in [found for found in self.packed if register in found]:
            name = self.packed.pop(registers)
            for i, one in enumerate(registers):
                view = "" if (home := self.home(one)) == "f4" else f".view({home})"
                self.vote(one, "f4")
                self.line(f"{self.variable(one)} = {name}[{i}]{view}")

    def unpack_all(self) -> None:
        while self.packed:
            self.unpack(next(iter(self.packed))[0])

    # --- the function

    def line(self, text: str) -> None:
        self.lines.append(self.indent + text)
        self.of_line.append(self.now)

    def write(self) -> None:
        body = _with_waits(self.kernel.body)
        targets = {name for table in self.kernel.tables.values() for name in table}
        targets |= {str(x.operands[0]) for x in body if isinstance(x, Instruction) and x.opcode.startswith("bra")}
        blocks: list[list[Instruction]] = [[]]
        self.number_of: dict[str, int] = {}
        for item in body:
            if isinstance(item, str):
                if item in targets:
                    if blocks[-1]:
                        blocks.append([])
                    self.number_of[item] = len(blocks) - 1
            else:
                blocks[-1].append(item)
                if item.opcode.startswith(("bra", "brx", "ret")):
                    blocks.append([])
        for number, block in enumerate(blocks):
            self.indent = "        "
            self.line(f"if pc == {number}:")
            self.indent = "            "
            for instruction in block:
                self.now = instruction
                self.places.append(instruction.place)
                self._write_instruction(instruction)
            self.unpack_all()
            self.line(f"pc = {number + 1}")
        self._write_head()

    def _write_head(self) -> None:
        """Registers before their first assignment, which the compiler allows where it does not matter."""
        head = ["def program(w):"]
        by_home: dict[str, list[str]] = {}
        for register in self.registers:
            by_home.setdefault(self.home(register), []).append(self.variable(register))
        for home, names in by_home.items():
            head.append(f"    {' = '.join(names)} = UNDEFINED_{home}")
        head += ["    yield", "    pc = 0", "    while True:"]
        self.lines[:0] = head
        self.of_line[:0] = [self.now] * len(head)

    def _write_instruction(self, x: Instruction) -> None:
        name, *parts = x.opcode.split(".")
        kind = parts[-1] if parts else ""
        if x.opcode.startswith(NOTHING):
            return
        if (simple := SIMPLE.get(".".join([name, *parts[:-1]]))) and kind in DTYPES:
            self._write_simple(x, name, simple, kind)
        elif x.opcode == "add.s16x2":
            a, b = (f"np.ascontiguousarray({self.value(s, 'i4')}).view(i2)" for s in x.operands[1:])
            self.assign(x.operands[0], f"({a} + {b}).view(i4)", "i4")
        elif writer := getattr(self, f"_write_{name}", None):
            writer(x, parts)
        else:
            raise NotImplementedError(f"{x} ({x.place})")

    def _write_simple(self, x: Instruction, name: str, simple: str, kind: str) -> None:
        target, *sources = x.operands
        if kind == "pred":
            self.assign(target, f"{simple.format(*[self.value(s, 'pred') for s in sources])}", "pred")
            return
        dtype = DTYPES[kind]
        if kind == "f32" and name in ("min", "max"):
            raise NotImplementedError(str(x))
        if name == "selp":
            if kind.startswith("b"):
                self.join(target, *sources[:2])
                dtype = self.home(str(target))
            values = [*[self.value(s, dtype) for s in sources[:2]], self.value(sources[2], "pred")]
        elif name in ("shl", "shr"):
            shift = self.value(sources[1], "i4") if self.kernel.is_register(str(sources[1])) else None
            values = [
                self.value(sources[0], dtype),
                f"{shift}.astype({dtype})" if shift else self.value(sources[1], dtype),
            ]
        elif name == "bfe":
            values = [self.value(sources[0], dtype), *[self.value(s, "i4") for s in sources[1:]]]
        elif name == "lop3":
            values = [*[self.value(s, dtype) for s in sources[:3]], str(self.number(sources[3]))]
        else:
            values = [self.value(s, dtype) for s in sources]
        self.assign(target, simple.format(*values), "i4" if name == "popc" else dtype)

    def _write_min(self, x: Instruction, parts: list[str]) -> None:
        self._write_extreme(x, parts, "min")

    def _write_max(self, x: Instruction, parts: list[str]) -> None:
        self._write_extreme(x, parts, "max")

    def _write_extreme(self, x: Instruction, parts: list[str], which: str) -> None:
        dtype = DTYPES[parts[-1]]
        # of a NaN and a number PTX gives the number, but for .NaN
        function = f"f{which}" if parts == ["f32"] else f"{which}imum"
        assert parts in (["f32"], ["NaN", "f32"], [parts[-1]]), str(x)
        target, *sources = x.operands
        self.assign(target, f"np.{function}({', '.join(self.value(s, dtype) for s in sources)})", dtype)

    def _write_mul(self, x: Instruction, parts: list[str]) -> None:
        self._write_wide(x, parts, "{} * {}")

    def _write_mad(self, x: Instruction, parts: list[str]) -> None:
        self._write_wide(x, parts, "{} * {} + {}")

    def _write_wide(self, x: Instruction, parts: list[str], expression: str) -> None:
        if parts[0] != "wide":
            raise NotImplementedError(str(x))
        narrow = DTYPES[parts[1]]
        wide = f"{narrow[0]}{2 * int(narrow[1])}"
        target, *sources = x.operands
        values = [f"{self.value(s, narrow)}.astype({wide})" for s in sources[:2]]
        values += [self.value(s, wide) for s in sources[2:]]
        self.assign(target, expression.format(*values), wide)

    def _write_setp(self, x: Instruction, parts: list[str]) -> None:
        target, a, b = x.operands
        if len(parts) != 2 or (parts[0] == "ne" and parts[1] == "f32"):
            raise NotImplementedError(str(x))
        dtype = DTYPES[parts[1]]
        comparison = (FLOAT_COMPARISONS if dtype[0] == "f" else COMPARISONS)[parts[0]]
        self.assign(target, comparison.format(self.value(a, dtype), self.value(b, dtype)), "pred")

    def _write_cvt(self, x: Instruction, parts: list[str]) -> None:
        target, *sources = x.operands
        to, of = parts[-2:]
        if to in ("bf16x2", "f16x2"):
            assert parts[0] == "rn" and len(parts) == 3, str(x)
            high, low = (self.value(s, "f4") for s in sources)
            self.assign(target, f"{to}({high}, {low})", "i4")
        elif of in ("bf16", "f16") and to == "f32":
            self.assign(target, f"f32_of_{of}({self.value(sources[0], 'u2')})", "f4")
        elif to in ("bf16", "f16") and of == "f32":
            assert parts[0] == "rn" and len(parts) == 3, str(x)
            self.assign(target, f"{to}_of_f32({self.value(sources[0], 'f4')})", "u2")
        elif of[0] == "f" and to[0] in "su":
            assert parts[0] in ("rzi", "rni", "rmi", "rpi"), str(x)
            dtype = DTYPES[to]
            self.assign(target, f"integer_of({self.value(sources[0], DTYPES[of])}, {parts[0]!r}, {dtype})", dtype)
        elif of[0] in "su" and to in ("f32", "f64"):
            assert parts[0] == "rn", str(x)
            self.assign(target, f"{self.value(sources[0], DTYPES[of])}.astype({DTYPES[to]})", DTYPES[to])
        elif of in ("f32", "f64") and to in ("f32", "f64") and of != to:
            self.assign(target, f"{self.value(sources[0], DTYPES[of])}.astype({DTYPES[to]})", DTYPES[to])
        elif len(parts) == 2 and of[0] in "su" and to[0] in "su":
            source, dtype = self.value(sources[0], DTYPES[of]), DTYPES[to]
            if to in ("s8", "u8"):  # in a wider register
                self.assign(target, f"{source}.astype({dtype}).astype({dtype[0]}2)", f"{dtype[0]}2")
            else:
                self.assign(target, f"{source}.astype({dtype})", dtype)
        else:
            raise NotImplementedError(str(x))

    def _write_mov(self, x: Instruction, parts: list[str]) -> None:
        target, source = x.operands
        if isinstance(target, tuple):  # unpack
            size = SIZES[parts[0]] // len(target)
            assert not x.guard, str(x)
            self.line(
                f"parts = np.ascontiguousarray({self.value(source, '')}).view(u{size}).reshape(32, {len(target)})"
            )
            for i, part in enumerate(target):
                self.assign(part, f"parts[:, {i}]", f"u{size}")
        elif isinstance(source, tuple):
            size = SIZES[parts[0]] // len(source)
            values = ", ".join(self.value(s, f"u{size}") for s in source)
            self.assign(target, f"np.stack(({values}), 1).view(u{SIZES[parts[0]]})[:, 0]", f"u{SIZES[parts[0]]}")
        elif found := re.match(r"\w+_param_(\d+)$", str(source)):
            dtype = DTYPES[parts[0]]
            self.assign(target, self.constant(str(PARAMETER_BYTES * (int(found[1]) + 1)), dtype), dtype)
        elif parts[0] == "pred":
            self.assign(target, self.value(source, "pred"), "pred")
        elif str(source).startswith("%") and not self.kernel.is_register(str(source)):
            self.assign(target, self.value(source, "i4"), "i4")  # %tid.x and the like
        else:
            self.join(target, source)
            self.assign(target, self.value(source, self.home(str(target))), "")

    def _write_cvta(self, x: Instruction, parts: list[str]) -> None:
        assert parts[0] in ("param", "to"), str(x)
        self.assign(x.operands[0], self.value(x.operands[1], "i8"), "i8")

    # --- branches

    def _write_bra(self, x: Instruction, parts: list[str]) -> None:
        self.unpack_all()
        number = self.number_of[str(x.operands[0])]
        if x.guard:
            value = self.value(x.guard, "pred")
            self.line(f"if {'not ' * x.is_negated}is_true({value}): pc = {number}; continue")
        else:
            self.line(f"pc = {number}; continue")

    def _write_brx(self, x: Instruction, parts: list[str]) -> None:
        self.unpack_all()
        assert not x.guard, str(x)
        numbers = [self.number_of[name] for name in self.kernel.tables[str(x.operands[1])]]
        self.line(f"pc = {numbers}[{self.uniform(x.operands[0])}]; continue")

    def _write_ret(self, x: Instruction, parts: list[str]) -> None:
        self.line(f"if {'not ' * x.is_negated}is_true({self.value(x.guard, 'pred')}): return" if x.guard else "return")

    # --- lanes among themselves

    def _write_shfl(self, x: Instruction, parts: list[str]) -> None:
        target, a, b, c = x.operands[:4]
        assert not x.guard and "|" not in str(target), str(x)
        self.join(target, a)
        home = self.home(str(target))
        lanes = self.value(b, "i4")
        self.assign(target, f"{self.value(a, home)}[lanes_of_{parts[1]}({lanes}, {self.number(c)})]", "")

    def _write_redux(self, x: Instruction, parts: list[str]) -> None:
        dtype = DTYPES[parts[2]]
        assert not x.guard, str(x)
        functions = {"add": "add", "min": "minimum", "max": "maximum"}
        functions |= {name: f"bitwise_{name}" for name in ("and", "or", "xor")}
        value = f"np.{functions[parts[1]]}.reduce({self.value(x.operands[1], dtype)}).astype({dtype})"
        self.assign(x.operands[0], f"np.full(32, {value})", dtype)

    def _write_vote(self, x: Instruction, parts: list[str]) -> None:
        assert not x.guard, str(x)
        value = self.value(x.operands[1], "pred")
        if parts[1] == "ballot":
            self.assign(x.operands[0], f"ballot({value})", "u4")
        else:
            assert parts[1] in ("any", "all"), str(x)
            self.assign(x.operands[0], f"np.full(32, {value}.{parts[1]}())", "pred")

    def _write_elect(self, x: Instruction, parts: list[str]) -> None:
        lane, _, predicate = str(x.operands[0]).partition("|")
        self.assign(lane, "ZERO", "i4")
        self.assign(predicate, "FIRST_LANE", "pred")

    # --- memory

    def _write_ld(self, x: Instruction, parts: list[str]) -> None:
        address, targets = x.operands[1], x.operands[0]
        assert isinstance(address, Address)
        if parts[0] == "param":
            assert not address.offset, str(x)
            if self.kernel.is_register(address.base):
                index = f"{self.uniform(address.base)} // {PARAMETER_BYTES} - 1"
            else:
                index = re.search(r"_param_(\d+)$", address.base)[1]
            self.assign(targets, f"w.parameters[{index}]", DTYPES[parts[1]])
            return
        space = self._space(parts)
        kind, count = parts[-1], self._count(parts)
        dtype, targets = DTYPES[kind], targets if isinstance(targets, tuple) else (targets,)
        size = int(dtype[1])
        self.line(f"loaded = w.load_{space}({self._address(address)}, {size}, {count}, {self.guard()}, {self.at})")
        for i, target in enumerate(targets):
            register = self.home(str(target)) if target != "_" else "i4"
            if size == int(register[1]):
                self.assign(target, f"loaded[{i}].view({dtype})", dtype)
            else:
                wide = f"{'i' if dtype[0] == 'i' and kind[0] == 's' else 'u'}{register[1]}"
                narrow = f"{wide[0]}{size}"
                self.assign(target, f"loaded[{i}].view({narrow}).astype({wide})", wide)

    def _write_st(self, x: Instruction, parts: list[str]) -> None:
        address, sources = x.operands
        assert isinstance(address, Address)
        kind = parts[-1]
        sources = sources if isinstance(sources, tuple) else (sources,)
        dtype = f"u{DTYPES[kind][1]}"
        values = [self.value(s, dtype) for s in sources]
        arguments = f"{self._address(address)}, {dtype[1]}, ({', '.join(values)},), {self.guard()}, {self.at}"
        self.line(f"w.store_{self._space(parts)}({arguments})")

    def _write_atom(self, x: Instruction, parts: list[str]) -> None:
        target, address, value = x.operands
        assert isinstance(address, Address) and parts[0] == "global" and parts[-2:] == ["add", "u32"], str(x)
        target = target[0] if isinstance(target, tuple) else target
        self.line(f"loaded = w.add_global({self._address(address)}, {self.value(value, 'u4')}, {self.guard()})")
        self.assign(target, "loaded", "u4")
        self.line("yield")

    def _space(self, parts: list[str]) -> str:
        assert parts[0] in ("global", "shared"), str(self.now)
        return parts[0]

    def _count(self, parts: list[str]) -> int:
        return next((int(part[1]) for part in parts if re.match(r"v\d$", part)), 1)

    def _address(self, address: Address) -> str:
        """Two arguments: the register's value, and the constant added to it."""
        if address.base.startswith("global_smem"):
            return f"ZERO_U4, {address.offset}"
        wide = self.kernel.type_of(address.base).endswith("64")
        return f"{self.value(address.base, 'i8' if wide else 'u4')}, {address.offset}"

    def _write_stmatrix(self, x: Instruction, parts: list[str]) -> None:
        assert parts[:3] == ["sync", "aligned", "m8n8"] and not x.guard, str(x)
        address, sources = x.operands
        values = ", ".join(self.value(s, "u4") for s in sources)
        self.line(f"w.store_matrices({self._address(address)}, ({values},), {'trans' in parts}, {self.at})")

    def _write_ldmatrix(self, x: Instruction, parts: list[str]) -> None:
        assert parts[:3] == ["sync", "aligned", "m8n8"] and not x.guard, str(x)
        targets, address = x.operands
        is_transposed = "trans" in parts
        self.line(f"loaded = w.load_matrices({self._address(address)}, {len(targets)}, {is_transposed}, {self.at})")
        for i, target in enumerate(targets):
            self.assign(target, f"loaded[{i}]", "u4")

    # --- barriers

    def _write_mbarrier(self, x: Instruction, parts: list[str]) -> None:
        number = self.at
        if parts[0] == "init":
            address, count = x.operands
            self.line(f"w.init_barrier({self._address(address)}, {self.number(count)}, {self.guard()}, {number})")
        elif parts[0] == "arrive":
            assert x.operands[0] == "_", str(x)
            count_or_bytes = x.operands[2] if len(x.operands) > 2 else "1"
            arguments = f"{self._address(x.operands[1])}, {self.number(count_or_bytes)}, {self.guard()}, {number}"
            self.line(f"w.{'expect' if 'expect_tx' in parts else 'arrive'}({arguments})")
            self.line("yield")
        elif parts[0] == "wait":
            address, parity = x.operands
            self.line(f"yield w.wait({self._address(address)}, {self.value(parity, 'i4')}, {self.guard()})")
        else:
            raise NotImplementedError(str(x))

    def _write_bar(self, x: Instruction, parts: list[str]) -> None:
        assert not x.guard and parts[0] in ("sync", "arrive"), str(x)
        count = self.uniform(x.operands[1]) if len(x.operands) > 1 else "None"
        self.line(f"yield w.named_barrier({self.uniform(x.operands[0])}, {count}, {parts[0] == 'sync'})")

    _write_barrier = _write_bar

    def _write_fence(self, x: Instruction, parts: list[str]) -> None:
        if x.opcode not in FENCES:
            raise NotImplementedError(str(x))
        self.line("w.fence()")
        self.line("yield")

    # --- what goes on beside the warp

    def _write_wgmma(self, x: Instruction, parts: list[str]) -> None:
        if parts[0] == "commit_group":
            self.line("w.products.commit()")
            self.line("yield")
        elif parts[0] == "wait_group":
            self.line(f"w.products.wait({self.number(x.operands[0])})")
            self.line("yield")
        else:
            self._write_product(x, parts)

    def _write_product(self, x: Instruction, parts: list[str]) -> None:
        """wgmma.mma_async.sync.aligned.shape.f32.type.type d, a, b, scale-d, scale-a, scale-b[, trans-a], trans-b"""
        registers, a, b, scale, *rest = x.operands
        shape, of_d, of_a, of_b = parts[3:]
        columns = int(re.match(r"m64n(\d+)k16$", shape)[1])
        assert of_d == "f32" and of_a == of_b and rest[:2] == ["1", "1"] and not x.guard, str(x)
        transposed = [flag == "1" for flag in rest[2:]]
        if isinstance(a, tuple):
            transposed.insert(0, False)
            of_a_value = f"({', '.join(self.value(r, 'u4') for r in a)},)"
        else:
            of_a_value = f"int({self.value(a, 'i8')}[0])"
        if registers in self.packed:
            name = self.packed[registers]
            before = name
        else:
            name = f"acc_{len(self.places)}"
            before = f"np.array(({', '.join(self.value(r, 'f4') for r in registers)},))"
        if self.kernel.is_register(str(scale)):
            before = f"({before} if is_true({self.value(scale, 'pred')}) else None)"
        elif self.number(scale) == 0:
            before = "None"
        of_b_value = f"int({self.value(b, 'i8')}[0])"
        arguments = (
            f"{before}, {of_a_value}, {of_b_value}, {columns}, {of_a!r}, {transposed[0]}, {transposed[1]}, {self.at}"
        )
        self.line(f"{name} = w.products.multiply({arguments})")
        for register in registers:
            self.home(register)
        self.packed[registers] = name

    def _write_cp(self, x: Instruction, parts: list[str]) -> None:
        if parts[:3] == ["async", "bulk", "tensor"]:
            self._write_tensor_copy(x, parts)
        elif parts[:2] == ["reduce", "async"]:
            assert parts[2:4] == ["bulk", "tensor"] and "add" in parts, str(x)
            self._write_tensor_store(x, True)
        elif parts[:3] == ["async", "bulk", "commit_group"]:
            self.line("w.stores.commit()")
            self.line("yield")
        elif parts[:3] == ["async", "bulk", "wait_group"]:
            assert parts[3:] in (["read"], []), str(x)
            self.line(f"yield w.stores.wait({self.number(x.operands[0])})")
        elif parts[:2] == ["async", "commit_group"]:
            self.line("w.copies.commit()")
        elif parts[:2] == ["async", "wait_group"]:
            self.line(f"w.copies.wait({self.number(x.operands[0])})")
        else:
            assert parts[2:] == ["shared", "global"] and parts[1] in ("ca", "cg"), str(x)
            to, of, size, *sizes = x.operands
            read = self.value(sizes[0], "i4") if sizes else "None"
            arguments = f"{self._address(to)}, {self._address(of)}, {self.number(size)}, {read}, {self.guard()}"
            self.line(f"w.copies.copy({arguments}, {self.at})")

    def _write_tensor_copy(self, x: Instruction, parts: list[str]) -> None:
        if parts[4] == "global":
            self._write_tensor_store(x, False)
            return
        to, of, barrier = x.operands
        assert (
            parts[4] in ("shared::cluster", "shared::cta")
            and parts[5] == "global"
            and parts[-1] == "mbarrier::complete_tx::bytes"
        ), str(x)
        coordinates = ", ".join(self.value(c, "i4") for c in of.coordinates)
        arguments = f"{self._address(to)}, {self.value(of.base, 'i8')}, ({coordinates},), {self._address(barrier)}"
        self.line(f"w.load_tile({arguments}, {self.guard()}, {self.at})")
        self.line("yield")

    def _write_tensor_store(self, x: Instruction, is_sum: bool) -> None:
        to, of = x.operands
        coordinates = ", ".join(self.value(c, "i4") for c in to.coordinates)
        arguments = f"{self.value(to.base, 'i8')}, ({coordinates},), {self._address(of)}, {is_sum}, {self.guard()}"
        self.line(f"w.stores.store({arguments}, {self.at})")
        self.line("yield")


def _with_waits(body: list[str | Instruction]) -> list[str | Instruction]:
    """A loop around mbarrier.try_wait as one instruction: mbarrier.wait."""
    result: list[str | Instruction] = []
    i = 0
    while i < len(body):
        item = body[i]
        if isinstance(item, Instruction) and item.opcode.startswith("mbarrier.try_wait.parity"):
            label, branch = body[i - 1], body[i + 1]
            is_loop = isinstance(branch, Instruction) and branch.opcode.startswith("bra")
            is_loop = is_loop and branch.operands == (label,) and branch.guard == item.operands[0] and branch.is_negated
            if not is_loop:
                raise NotImplementedError(f"{item} outside of a loop")
            result[-1:] = [Instruction("mbarrier.wait", item.operands[1:], item.guard, item.is_negated, item.place)]
            i += 1
        else:
            result.append(item)
        i += 1
    return result
