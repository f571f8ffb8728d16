"""The machine code of a cubin, as nvdisasm prints it: instructions, where they come from, loops, how often they run.

An instruction carries the chain of source lines that inlining left: its own and those of the calls around it. A loop
is a jump back. How often it turns no compiler knows, so :func:`executions` takes that from a table of source snippets:
a loop is found by a piece of its line, and blocks that a case does not reach are left out by a piece of their first
line. A loop that the table does not name is an error: a kernel that changes cannot keep an old price.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
Place = tuple[str, int]  # file, line

PIPES = {
    "memory": ("LD", "ST", "SHFL", "ATOM", "RED", "CCTL"),
    "tensor": ("HMMA", "IMMA"),
    "special": ("MUFU", "I2F", "F2I", "F2F"),
    "multiply": ("FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HMUL2", "HADD2"),
    "double": ("DADD", "DFMA", "DMUL", "DSETP"),
    "uniform": ("U", "R2UR", "S2UR", "LDC"),
    "control": (
        "BRA",
        "BSSY",
        "BSYNC",
        "EXIT",
        "BAR",
        "WARPSYNC",
        "NOP",
        "CALL",
        "RET",
        "DEPBAR",
        "WARP",
        "BREAK",
    ),
}


@dataclass(frozen=True)
class Instruction:
    """One line of the listing; ``places`` innermost first."""

    text: str
    places: tuple[Place, ...]
    target: int | None = None  # index of the instruction that it may jump to

    @property
    def opcode(self) -> str:
        return self.text.split()[1 if self.text.startswith("@") else 0]

    @property
    def pipe(self) -> str:
        name = self.opcode
        if name.startswith(("ULDC", "LDC")):
            return "uniform"
        found = (pipe for pipe, starts in PIPES.items() if name.startswith(starts))
        return next(found, "alu")

    @property
    def access_bytes(self) -> int:
        """Of global memory, by a lane."""
        name = self.opcode
        if not name.startswith(("LDG.", "LDGSTS", "STG")):
            return 0
        widths = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}
        return next((size for part, size in widths.items() if part in name), 4)

    @property
    def wavefronts(self) -> int:
        """Passes of the memory pipe: 128 bytes each, so that 16 bytes a lane take four."""
        if self.pipe != "memory":
            return 0
        return (
            4
            if ".128" in self.opcode or "x4" in self.text or ".M88.4" in self.opcode
            else 2
            if ".64" in self.opcode
            else 1
        )


@dataclass
class Function:
    """A kernel."""

    name: str
    code: list[Instruction]
    reached: set[int] = field(default_factory=set)

    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of every loop that the kernel can reach."""
        return [
            (jump.target, at)
            for at, jump in enumerate(self.code)
            if at in self.reached and jump.target is not None and jump.target <= at
        ]


def tool(name: str) -> str:
    """nvdisasm or cuobjdump: of the packages nvidia-cuda-..., or on the path."""
    packaged = sorted(Path(sys.prefix).glob(f"lib/python*/site-packages/nvidia/*/bin/{name}"))
    found = str(packaged[-1]) if packaged else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is missing: pip install nvidia-cuda-{name}")
    return found


def listing(cubin: Path) -> str:
    return subprocess.run(
        [tool("nvdisasm"), "-gi", "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout


def functions(text: str, wanted: Sequence[str]) -> Iterator[Function]:
    """The kernels of a listing whose names hold one of ``wanted``."""
    parts = re.split(r"\n\.text\.(\S+):\n", text)
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        if any(part in name for part in wanted):
            yield _function(name, body.split("\n//-----", 1)[0])


_PLACE = re.compile(r'"([^"]+)", line (\d+)')
_CODE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"(\.L_x_\d+):")


def _function(name: str, body: str) -> Function:
    rows: list[tuple[str, tuple[Place, ...]]] = []
    labels: dict[str, int] = {}
    places: list[Place] = []
    fresh = True  # the next line of places starts a new chain
    for line in body.splitlines():
        if line.startswith("\t//## File"):
            if fresh:
                places, fresh = [], False
            file, number = _PLACE.findall(line)[0]
            places.append((file, int(number)))
        elif match := _LABEL.match(line):
            labels[match[1]] = len(rows)
        elif match := _CODE.match(line):
            rows.append((match[1], tuple(places)))
            fresh = True
    code = []
    for text, chain in rows:
        jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", text)
        code.append(Instruction(text, chain, labels.get(jump[1]) if jump and "BRA.DIV" not in text else None))
    return Function(name, code, _reached(code))


def _reached(code: Sequence[Instruction]) -> set[int]:
    """What runs while the lanes of a warp stay together: not the detours of BRA.DIV."""
    seen: set[int] = set()
    todo = [0]
    while todo:
        at = todo.pop()
        while at < len(code) and at not in seen:
            seen.add(at)
            here = code[at]
            if here.target is not None:
                todo.append(here.target)
            ends = here.opcode in ("EXIT", "RET") or here.opcode.startswith("RET.")
            if not here.text.startswith("@") and (
                ends
                or (
                    here.target is not None
                    and "BRA" in here.opcode
                    and not re.search(r"BRA\s+!?U?P\d", here.text)
                )
            ):
                break
            at += 1
    return seen


@cache
def _lines(file: str) -> tuple[str, ...]:
    # A wheel is compiled from a copy of csrc that is gone since.
    here = CSRC / file.rpartition("/csrc/")[2] if "/csrc/" in file else Path(file)
    return tuple(here.read_text().splitlines()) if here.is_file() else ()


def _source(place: Place) -> str:
    lines = _lines(place[0])
    return lines[place[1] - 1] if 0 < place[1] <= len(lines) else ""


@cache
def block_end(file: str, first: int) -> int:
    """Last line of the block that opens on line ``first``, or ``first`` itself where none does."""
    depth = 0
    for number, line in enumerate(_lines(file)[first - 1 :], start=first):
        # "} else {" opens a block of its own
        depth += (
            line.count("{")
            - line.count("}")
            + (1 if number == first and line.lstrip().startswith("}") else 0)
        )
        if depth <= 0:
            return number
    return first


Trips = Mapping[str, "float | tuple[float, ...]"]


def executions(function: Function, trips: Trips, skipped: Sequence[str]) -> list[float]:
    """How often a warp runs each instruction.

    A tuple of turns is for a line of which the compiler made several loops, as of an unrolled one: of the first in the
    code, of the second, and so on.
    """
    counts = [1.0 if at in function.reached else 0.0 for at in range(len(function.code))]
    left_out = _left_out(function, skipped)
    for at in range(len(counts)):
        if any(place in left_out for place in function.code[at].places):
            counts[at] = 0.0
    seen: dict[str, int] = {}  # loops of a line so far
    for first, last in function.loops():
        places = function.code[last].places
        found = [snippet for place in places for snippet in trips if snippet in _source(place)]
        if not found:
            if counts[last] == 0:
                continue
            where = " <- ".join(f"{Path(f).name}:{n}" for f, n in places)
            raise ValueError(f"{function.name}: the loop at {where} has no declared number of turns")
        turns = trips[found[0]]
        if isinstance(turns, tuple):
            number = seen[found[0]] = seen.get(found[0], 0) + 1
            if number > len(turns):
                raise ValueError(
                    f"{function.name}: more loops than the {len(turns)} declared of {found[0]!r}"
                )
            turns = turns[number - 1]
        for at in range(first, last + 1):
            counts[at] *= turns
    return counts


def _left_out(function: Function, skipped: Sequence[str]) -> set[Place]:
    places = {place for instruction in function.code for place in instruction.places}
    files = {file for file, _ in places}
    out: set[Place] = set()
    for file in files:
        for number, line in enumerate(_lines(file), start=1):
            if any(snippet in line for snippet in skipped):
                out |= {(file, n) for n in range(number, block_end(file, number) + 1)}
    return out
