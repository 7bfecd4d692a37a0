"""What an optimiser makes of a kernel when it relies on the source alone: README.md, Code generation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from . import llvm_ir
from .library import without_standard_includes
from .llvm_ir import Function, Instruction
from .rewrite import Rewriter
from .toolchain import HERE, METAL_LANGUAGE, cached, preprocess, run, shim_text

SHIM = HERE / "shim_opaque" / "metal.h"
OPTIONS = [
    # The nearest to Apple's own intermediate code that clang has: its address spaces, vectors as values, and no cost
    # model, so that no threshold of an x86 decides.
    *["-target", "spir64-unknown-unknown", *METAL_LANGUAGE, "-S", "-emit-llvm", "-O2"],
    "-fno-unroll-loops",  # only a pragma unrolls: how far Apple's compiler goes by itself is not known
    "-fno-inline-functions",  # only always_inline is inlined: for the same reason
    *["-fno-vectorize", "-fno-slp-vectorize"],  # the lanes of a GPU are its vectors
    *["-ffp-contract=off", "-fno-math-errno"],  # as metal_on_cpu executes it
    *["-gline-tables-only", "-fno-discard-value-names", "-Wno-everything"],  # the findings name lines and variables
    *["-Ddevice=__global", "-Dthreadgroup=__local", "-Dthread="],  # what a thread owns is checked by strict mode
]


@dataclass(frozen=True)
class Code:
    """What one kernel became: what is wrong with it, and ``Function.live_registers``."""

    findings: list[str]
    live_registers: int


def inspect(source: str, name: str = "metal") -> dict[str, Code]:
    """Compile Metal source, simdgroup operations opaque, and look at each kernel's code; by host name."""
    rewritten = Rewriter(preprocess(without_standard_includes(source), name)).run()

    def build(path: Path) -> None:
        module = Module(run("clang", [*OPTIONS, "-include", SHIM, "-o", "-", "-"], stdin=rewritten.text), source, name)
        path.write_text(json.dumps([asdict(module.kernel(entry.symbol)) for entry in rewritten.entries.values()]))

    tool = [Path(file).read_text() for file in (__file__, llvm_ir.__file__, SHIM)]
    path = cached(f"{name}-code", [rewritten.text, *tool, shim_text()], ".json", build)
    found = json.loads(path.read_text())  # without host names, which the text that the cache goes by has not
    return {host_name: Code(**code) for host_name, code in zip(rewritten.entries, found, strict=True)}


class Module:
    """The IR of one translation unit, and the source that it was made of."""

    def __init__(self, ir: str, source: str, name: str) -> None:
        self.definitions = {found[1]: (found[2], found[3]) for found in llvm_ir.DEFINITION.finditer(ir)}
        self.metadata = dict(re.findall(r"^(!\d+) = (.*)$", ir, re.MULTILINE))
        self.source, self.file = source.split("\n"), f'filename: "{name}"'

    def kernel(self, launcher: str) -> Code:
        """The kernel that a launcher of the rewriter calls."""
        called = {found.callee for found in Function(*self.definitions[launcher]) if found.opcode == "call"}
        (symbol,) = called & self.definitions.keys()
        function = Function(*self.definitions[symbol])
        findings = {
            *self.private_memory(function),
            *self.components(function),
            *self.calls(function),
            *self.multiplies(function),
        }
        return Code(sorted(findings), function.live_registers())

    def private_memory(self, function: Function) -> Iterator[str]:
        """Variables of a thread that are left in memory: where they are indexed, or whom they are handed to."""
        for variable in function:
            if variable.opcode != "alloca":
                continue
            pointers, causes = {variable.result}, []
            for user in function:
                if not pointers.intersection(user.values):
                    continue
                if user.opcode in ("getelementptr", "addrspacecast"):
                    pointers.add(user.result)
                if (user.opcode == "getelementptr" and user.has_variable_index) or (
                    user.opcode == "call" and user.callee in self.definitions
                ):
                    causes.append(user)
            place = self.at(causes[0], function) if causes else "no variable index"
            yield f"private memory: {variable.result[1:]}, {variable.rest.partition(',')[0]}; {place}"

    def components(self, function: Function) -> Iterator[str]:
        """Components of vectors chosen at run time: memory too, once vectors are registers."""
        for found in function:
            if found.opcode in ("insertelement", "extractelement") and found.has_variable_index:
                yield f"component by variable index: {self.at(found, function)}"

    def calls(self, function: Function) -> Iterator[str]:
        """Calls of what the source defines, or by pointer. What the shim leaves opaque is declared and not defined."""
        for found in function:
            if found.opcode == "call" and (found.callee is None or found.callee in self.definitions):
                yield f"call: {found.callee or 'by pointer'}; {self.at(found, function)}"

    def multiplies(self, function: Function) -> Iterator[str]:
        """64-bit products of two variables in an innermost loop."""
        for name in set().union(*function.innermost_loops()):
            for found in function.blocks[name].instructions:
                if found.opcode == "mul" and re.match(r"(?:nuw |nsw )*(?:<\d+ x )?i64>? %[^,]+, %", found.rest):
                    yield f"64-bit multiply: {self.at(found, function)}"

    def at(self, instruction: Instruction, function: Function) -> str:
        """The source's line that an instruction comes from, outside the shim. One that was moved has lost its line:
        then that of what uses it."""
        following: Instruction | None = instruction
        while following and not following.location:
            following = next((user for user in function if following.result in user.values), None)
        location = following and following.location
        while location:
            node = self.metadata[location]
            line, scope = int(re.findall(r"line: (\d+)", node)[0]), self.metadata[self.reference(node, "scope")]
            if line and self.file in self.metadata[self.reference(scope, "file")]:
                return f"line {line}: {self.source[line - 1].strip()}"
            location = self.reference(node, "inlinedAt")
        return "a line that the optimiser lost"

    @staticmethod
    def reference(node: str, name: str) -> str:
        """The metadata that a node names, or nothing."""
        found = re.search(rf"\b{name}: (!\d+)", node)
        return found[1] if found else ""
