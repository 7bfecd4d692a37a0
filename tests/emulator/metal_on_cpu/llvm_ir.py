"""LLVM's textual IR, as much of it as clang makes of a kernel: blocks, innermost loops, and what is live where."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

NAME = r'(?:[\w.$-]+|"[^"]*")'
VALUE = re.compile(rf"%{NAME}")
TYPE = re.compile(r"<\d+ x [^>]+>|(?<![\w.%])(?:i\d+|float|half|bfloat|ptr(?: addrspace\(\d+\))?)(?!\w)")
INSTRUCTION = re.compile(rf"(?:(%{NAME}) = )?(?:(?:tail|musttail|notail) )?(\w+) ?(.*)")
DEFINITION = re.compile(rf"^define [^@\n]*@({NAME})\(([^\n]*)\)[^()\n]*{{\n(.*?)\n}}", re.DOTALL | re.MULTILINE)
CASTS = {"trunc", "zext", "sext", "fptrunc", "fpext", "fptoui", "fptosi", "uitofp", "sitofp"} | {
    *("ptrtoint", "ptrtoaddr", "inttoptr", "bitcast", "addrspacecast")
}
MATRIX = "<64 x float>"  # of a simdgroup: a lane has two of its elements


@dataclass
class Instruction:
    result: str | None
    opcode: str
    rest: str
    location: str | None  # of its debug information

    @cached_property
    def values(self) -> list[str]:
        """The local values that it uses; names of types and of labels look alike and may be among them."""
        return VALUE.findall(self.rest)

    @property
    def callee(self) -> str | None:
        """What a call names; none for one by pointer."""
        found = re.search(rf"@({NAME})\(", self.rest)
        return found and found[1]

    @property
    def has_variable_index(self) -> bool:
        """Of a getelementptr, insertelement or extractelement: whether an index is no constant."""
        if self.opcode == "insertelement":
            return re.search(r", i\d+ %[^,]*$", self.rest) is not None
        return re.search(r", i\d+ %", self.rest) is not None

    @property
    def type(self) -> str:
        """Of its result."""
        if self.opcode in CASTS:
            return self.rest.rpartition(" to ")[2]
        if self.opcode == "alloca":
            return "ptr"
        types = TYPE.findall(re.sub(r"\brange\([^)]*\)", "", self.rest))
        vectors = [kind for kind in types if kind.startswith("<")]
        if self.opcode in ("icmp", "fcmp"):
            return f"{types[0].partition(' x ')[0]} x i1>" if types[0] in vectors else "i1"
        if self.opcode == "getelementptr":
            return next(kind for kind in types if kind.startswith("ptr"))
        if self.opcode == "select":
            return types[1]
        if self.opcode == "extractelement":
            return types[0].partition(" x ")[2].removesuffix(">")
        if self.opcode == "shufflevector":  # as long as its mask, the last operand
            return f"{vectors[-1].partition(' x ')[0]} x {types[0].partition(' x ')[2]}"
        return types[0]


@dataclass
class Block:
    instructions: list[Instruction] = field(default_factory=list)
    successors: list[str] = field(default_factory=list)
    predecessors: list[str] = field(default_factory=list)

    @cached_property
    def phis(self) -> list[Instruction]:
        return [found for found in self.instructions if found.opcode == "phi"]


class Function:
    """One definition. ``blocks`` are those that can be reached, in reverse post-order."""

    def __init__(self, parameters: str, body: str) -> None:
        self.parameters = {name: kind for kind, name in re.findall(rf"({TYPE.pattern})[^%]*(%{NAME})", parameters)}
        blocks: dict[str, Block] = {}
        for line in re.sub(r"\n    +|\n  \]", " ", body).split("\n"):  # a switch as one line
            if label := re.match(rf"({NAME}):", line):
                block = blocks[label[1]] = Block()
            elif line:
                code, _, metadata = line.strip().partition(", !")
                location = re.search(r"\bdbg (!\d+)", metadata)
                found = INSTRUCTION.match(code)
                assert found, line
                block.instructions.append(Instruction(*found.groups(), location and location[1]))
        for block in blocks.values():
            block.successors = re.findall(rf"label %({NAME})", block.instructions[-1].rest)
        self.blocks = {name: blocks[name] for name in reverse_post_order(blocks)}
        for name, block in self.blocks.items():
            for successor in block.successors:
                self.blocks[successor].predecessors.append(name)

    def __iter__(self) -> Iterator[Instruction]:
        return (instruction for block in self.blocks.values() for instruction in block.instructions)

    def innermost_loops(self) -> list[set[str]]:
        """The blocks of each natural loop that has no other loop inside."""
        dominators: dict[str, set[str]] = {}
        before: dict[str, set[str]] | None = None
        while dominators != before:
            before = dict(dominators)
            for name, block in self.blocks.items():
                known = [dominators[other] for other in block.predecessors if other in dominators]
                dominators[name] = {name}.union(set.intersection(*known) if known else ())
        loops: dict[str, set[str]] = {}
        for name, block in self.blocks.items():
            for header in dominators[name].intersection(block.successors):
                body, pending = loops.setdefault(header, {header}), [name]
                while pending:
                    if (member := pending.pop()) not in body:
                        body.add(member)
                        pending += self.blocks[member].predecessors
        return [body for header, body in loops.items() if not body.intersection(loops.keys() - {header})]

    def live_registers(self) -> int:
        """32-bit registers that the values take which are live at one point, at the most. Constants take none, nor do
        addresses of buffers, which all threads share; a constant offset is part of the access that uses it."""
        weights = {name: registers(kind) for name, kind in self.parameters.items() if not kind.startswith("ptr")}
        bases: dict[str, set[str]] = {}  # of a pointer with a constant offset: what it is an offset from

        def counted(values: Iterable[str]) -> set[str]:
            return {base for value in values for base in bases.get(value, (value,)) if base in weights}

        for found in self:
            if found.opcode == "getelementptr" and not found.has_variable_index:
                bases[found.result] = counted(found.values)
            elif found.result:
                weights[found.result] = registers(found.type)
        steps = {  # of each block, from its end: what is set and what is used
            name: [({found.result}, counted(found.values)) for found in reversed(block.instructions[len(block.phis) :])]
            for name, block in self.blocks.items()
        }
        ways = {}  # from block to block: the phis there, and their operands from here
        for name, block in self.blocks.items():
            for successor in block.successors:
                phis = self.blocks[successor].phis
                operands = (re.findall(rf"\[ (%{NAME}), %{re.escape(name)} \]", found.rest) for found in phis)
                ways[name, successor] = {found.result for found in phis}, counted(itertools.chain(*operands))
        live_in: dict[str, set[str]] = {name: set() for name in self.blocks}
        most, before = 0, None
        while live_in != before:
            before = dict(live_in)
            for name, block in reversed(self.blocks.items()):
                live: set[str] = set()
                for successor in block.successors:
                    phis, operands = ways[name, successor]
                    live |= live_in[successor] - phis | operands
                weight = sum(map(weights.__getitem__, live))
                for results, uses in steps[name]:
                    most = max(most, weight)
                    weight -= sum(map(weights.__getitem__, live & results))
                    live -= results
                    weight += sum(map(weights.__getitem__, uses - live))
                    live |= uses
                most = max(most, weight)
                live_in[name] = live
        return most


def registers(kind: str) -> int:
    """Of 32 bits, that a value of this type takes in a thread."""
    if kind == MATRIX:
        return 2
    if kind.startswith("ptr"):
        return 1 if kind == "ptr addrspace(3)" else 2  # threadgroup memory is small: taken as 32 bits
    count, _, element = kind.strip("<>").rpartition(" x ")
    bits = {"float": 32, "half": 16, "bfloat": 16}.get(element) or int(element.removeprefix("i"))
    return -(-int(count or 1) * bits // 32)


def reverse_post_order(blocks: Mapping[str, Block]) -> list[str]:
    entry = next(iter(blocks))
    order, seen, stack = [], {entry}, [(entry, iter(blocks[entry].successors))]
    while stack:
        name, successors = stack[-1]
        following = next((other for other in successors if other not in seen), None)
        if following is None:
            order.append(name)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(blocks[following].successors)))
    return order[::-1]
