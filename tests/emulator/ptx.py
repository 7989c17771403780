"""Kernel: the text of one PTX entry as a list of labels and instructions.

Only the syntax that Triton's compiler writes: one `.entry`, no functions, registers named by their type, inline
assembly with scopes of its own. (PTX ISA: "Syntax", "Directives".)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# The type of a register by its name, as LLVM names them.
REGISTER_BITS = {"p": "pred", "rs": "b16", "r": "b32", "rd": "b64", "f": "f32", "fd": "f64"}
_TOKEN = re.compile(r"[%$A-Za-z_][\w$]*")
_STATEMENT = re.compile(r"\s*(?:(?P<brace>[{}])|(?P<label>[$\w]+):(?!:)|(?P<text>[^;]+);)")


@dataclass(frozen=True)
class Place:
    """Where an instruction comes from: the line of the PTX, and that of the kernel's source."""

    line: int
    source: str

    def __str__(self) -> str:
        return f"{self.source} (PTX line {self.line})"


@dataclass(frozen=True)
class Address:
    """[parts]: a register or name, plus a constant; for tensors also coordinates."""

    base: str
    offset: int
    coordinates: tuple[str, ...] = ()


Operand = str | Address | tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    """opcode operands; guard: the predicate that lanes need, is_negated: must not have."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: str
    is_negated: bool
    place: Place

    def __str__(self) -> str:
        guard = f"@{'!' * self.is_negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(map(str, self.operands))}"


@dataclass
class Kernel:
    """types: of registers that inline assembly declares.  body: labels (str) and instructions."""

    name: str
    parameters: list[str]  # types: u64, u32, f32, ... or "map" for 128 bytes
    num_threads: int
    types: dict[str, str] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    body: list[str | Instruction] = field(default_factory=list)

    @staticmethod
    def of(text: str) -> Kernel:
        name = re.search(r"\.entry (\w+)\(", text)[1]
        head, body = text[text.index(".entry") :].split("\n{\n", 1)
        parameters = [
            "map" if found[2] else found[1]
            for found in re.finditer(r"\.param (?:\.align \d+ )?\.(\w+)[^,\n]*?\w+_param_\d+(\[128\])?", head)
        ]
        kernel = Kernel(name, parameters, int(re.search(r"\.reqntid (\d+)", head)[1]))
        first_line = text[: len(text) - len(body)].count("\n") + 1
        kernel._read(body, first_line)
        return kernel

    def type_of(self, register: str) -> str:
        """pred, b16, b32, b64, f32, ..."""
        if register in self.types:
            return self.types[register]
        return REGISTER_BITS[re.match(r"%([a-z]+)\d+$", register)[1]]

    def is_register(self, operand: str) -> bool:
        return operand in self.types or bool(re.match(r"%(p|rs|rd|r|fd|f)\d+$", operand))

    def _read(self, body: str, first_line: int) -> None:
        text, sources = _without_comments(body)
        renamed: list[dict[str, str]] = [{}]
        position, line, start = 0, 0, 0
        while found := _STATEMENT.match(text, position):
            line += text.count("\n", start, found.start(found.lastgroup))
            start, position = found.start(found.lastgroup), found.end()
            place = Place(first_line + line, sources[line])
            if found["brace"] == "{":
                renamed.append(dict(renamed[-1]) | _local_labels(text, position, place.line))
            elif found["brace"]:
                renamed.pop()
                if not renamed:
                    return  # the end of the entry
            elif found["label"]:
                self.body.append(renamed[-1].get(found["label"], found["label"]))
                if table := re.match(r"\s*\.branchtargets([^;]*);", text[position:]):
                    self.tables[self.body.pop()] = re.findall(r"[$\w]+", table[1])
                    position += table.end()
            else:
                self._read_statement(found["text"].strip(), renamed[-1], place)

    def _read_statement(self, text: str, renamed: dict[str, str], place: Place) -> None:
        if declared := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S):
            if "<" not in text:
                for name in re.findall(r"[\w]+", declared[2]):
                    renamed[name] = f"{name}_{place.line}_{len(self.types)}"
                    self.types[renamed[name]] = declared[1]
            return
        guard, is_negated = "", False
        if found := re.match(r"@(!?)([%\w]+)\s+", text):
            guard, is_negated = renamed.get(found[2], found[2]), bool(found[1])
            text = text[found.end() :]
        opcode, _, rest = text.partition(" ") if not re.match(r"\S+\t", text) else text.partition("\t")
        rest = _TOKEN.sub(lambda token: renamed.get(token[0], token[0]), rest)
        self.body.append(Instruction(opcode, tuple(map(_operand, _parts(rest))), guard, is_negated, place))


def _without_comments(body: str) -> tuple[str, list[str]]:
    """The text, its lines kept, and the source of each line: of the innermost and the outermost function."""
    lines, sources, source = [], [], "?"
    for line in body.split("\n"):
        if re.match(r"\s*\.loc\s", line):
            called = re.findall(r"(<anymask [^>]*>|[\w.]+):(\d+)(?::\d+)?", line.partition("//")[2])
            named = [f"{file}:{number}" for file, number in called]
            source = " in ".join(named[:1] + named[1:][-1:])
            line = ""
        lines.append("" if re.match(r"\s*\.(pragma|file|section)", line) else line.partition("//")[0])
        sources.append(source)
    return "\n".join(lines), sources


def _local_labels(text: str, position: int, line: int) -> dict[str, str]:
    """Labels of the scope that begins here, each with a name of its own."""
    depth, end = 1, position
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return {
        name: f"{name}_{line}_{position}" for name in re.findall(r"(?m)^\s*([A-Za-z]\w*):(?!:)", text[position:end])
    }


def _parts(text: str) -> list[str]:
    """Split at the commas outside of braces and brackets."""
    parts, depth, last = [], 0, 0
    for i, char in enumerate(text):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(char, 0)
        if char == "," and depth == 0:
            parts.append(text[last:i])
            last = i + 1
    return [part.strip() for part in (*parts, text[last:]) if part.strip()]


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text.startswith("["):
        base, *coordinates = _parts(text[1:-1])
        name, _, offset = base.partition("+")
        return Address(name.strip(), int(offset or 0), _operand(coordinates[0]) if coordinates else ())
    return text
