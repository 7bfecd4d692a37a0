"""clang's syntax tree of a Metal source, as the lint reads it."""

from __future__ import annotations

import json
import re
import subprocess
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from .rewrite import Rewriter
from .toolchain import HERE, METAL_LANGUAGE, TARGET, ToolError, cached, preprocess, zig

SOURCE = "<metal>"  # what clang calls the source
SPACES = ["-Ddevice=__global", "-Dthreadgroup=__local", "-Dthread=__private"]
POINTERS = "#pragma OPENCL EXTENSION __cl_clang_function_pointers : "
WARNINGS = ["-Wpre-c++17-compat", "-ferror-limit=0", "-fno-color-diagnostics", "-fno-caret-diagnostics"]
INCLUDE = re.compile(r"^[ \t]*#[ \t]*include\b[ \t]*(.*)$", re.MULTILINE)
LINE_MARKER = re.compile(r'#(?:line)? (\d+)(?: "(.*?)")?')
# Macros that stand for a value. Here they are constants instead, so that a declaration of that name is seen.
VALUES = dict(re.findall(r"^#define ([A-Z]\w*) (.*)$", (HERE / "shim" / "macros.h").read_text(), re.MULTILINE))
VALUES = {name: value for name, value in VALUES.items() if not name.startswith("METAL_")}
BEGIN = '# 1 "constants"\n'  # behind it stand constants, and the source
LAUNCHER = "metal_kernel_"
FUNCTIONS = {"FunctionDecl", "CXXMethodDecl", "CXXConstructorDecl", "CXXDestructorDecl", "CXXConversionDecl"}


class Node:
    """A node of the tree; ``node[key]`` is what clang wrote under that key, None where it wrote nothing."""

    def __init__(self, fields: dict[str, Any], line: int, parent: Node | None) -> None:
        self.fields = fields
        self.line = line
        self.parent = parent
        self.children: list[Node] = []

    def __getitem__(self, key: str) -> Any:
        return self.fields.get(key)

    @property
    def kind(self) -> str:
        return self.fields["kind"]

    @property
    def name(self) -> str:
        return self.fields.get("name", "")

    @property
    def type(self) -> str:
        """The type without typedefs, as clang spells it: ``const __global __bf16 *``."""
        spelled = self.fields.get("type", {})
        return spelled.get("desugaredQualType", spelled.get("qualType", ""))

    @cached_property
    def is_implicit(self) -> bool:
        """Whether the compiler declared this, or what holds this, by itself."""
        return bool(self["isImplicit"]) or (self.parent is not None and self.parent.is_implicit)

    @cached_property
    def in_function(self) -> str | None:
        """The id of the function whose body holds this node."""
        if self.parent is None:
            return None
        return self.parent["id"] if self.parent.kind in FUNCTIONS else self.parent.in_function

    @property
    def callee(self) -> str | None:
        """The id of the function that this expression names."""
        if self.kind == "MemberExpr":
            return self["referencedMemberDecl"]
        referenced = self["referencedDecl"] if self.kind == "DeclRefExpr" else None
        return referenced["id"] if referenced and referenced["kind"] in FUNCTIONS else None

    @property
    def callee_name(self) -> str:
        return self.name or self["referencedDecl"]["name"]

    @property
    def takes_function_address(self) -> bool:
        """Whether a function is used here other than by calling it."""
        if self.kind == "ImplicitCastExpr" and self["castKind"] == "FunctionToPointerDecay":
            parent = self.parent
            while parent and parent.kind == "ParenExpr":
                parent = parent.parent
            return parent is not None and not parent.kind.endswith("CallExpr")
        return self.kind == "UnaryOperator" and self["opcode"] == "&" and self.children[0].callee is not None


class Tree:
    """The nodes that stand in the source itself: those of the shim and of the executor's launchers are left out."""

    def __init__(self, text: str) -> None:
        """Parse Metal that ``preprocessed`` made; what clang refuses does not keep it from giving a tree."""
        constants = "".join(f"constant constexpr auto {name} = {value};\n" for name, value in VALUES.items())
        rewritten = f"{BEGIN}{constants}{Rewriter(text).run().text}"
        # One text without includes, so that a place in it is a number.
        text, _ = clang("-E", *SPACES, "-include", HERE / "shim" / "metal.h", text=rewritten)
        shim, _, own = text.partition(BEGIN)
        # The shim is parsed once, and its declarations, which were most of a tree, stay in the file that keeps them.
        # Blanks in its place keep its nodes' numbers apart from those of the source, in which function pointers are
        # allowed, so that the tree shows them: the lint refuses them.
        own = own.replace(f"{POINTERS}disable", f"{POINTERS}enable")
        text = f"{' ' * len(shim)}\n{POINTERS}enable\n{BEGIN}{own}"
        options = "-include-pch", precompiled(shim), "-fsyntax-only", *WARNINGS, "-Xclang", "-ast-dump=json"
        tree, self.log = clang(*options, text=text)
        self.nodes: list[Node] = []
        self.previous: dict[str, str] = {}
        self.starts, self.places = places(text)
        unit = Node({"kind": "TranslationUnitDecl"}, 0, None)
        for declaration in json.loads(tree)["inner"]:
            self.visit(declaration, unit, ("", 0))

    def place(self, offset: int) -> tuple[str, int]:
        """The file and line of a place in the text."""
        return self.places[bisect_right(self.starts, offset) - 1]

    def visit(self, fields: dict[str, Any], parent: Node | None, place: tuple[str, int]) -> None:
        """Take in a node, which stands at ``place`` (file, line) if it does not say where itself."""
        if (offset := offset_of(fields)) is not None:
            place = self.place(offset)
        node = Node(fields, place[1], parent)
        if node.name.startswith(LAUNCHER):
            return
        if node["previousDecl"]:
            self.previous[node["id"]] = node["previousDecl"]
        if place[0] == SOURCE:
            self.nodes.append(node)
        if parent is not None:
            parent.children.append(node)
        for child in fields.get("inner", ()):
            if "kind" in child:
                self.visit(child, node, place)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def first(self, declaration: str) -> str:
        """The id of a function's first declaration, which stands for all of them."""
        while declaration in self.previous:
            declaration = self.previous[declaration]
        return declaration

    def warnings(self, group: str) -> Iterator[tuple[int, str]]:
        """Line and text of clang's warnings of the group ``-W<group>`` in the source itself."""
        pattern = rf"^{re.escape(SOURCE)}:(\d+):\d+: warning: (.*) \[-W{re.escape(group)}\]$"
        for match in re.finditer(pattern, self.log, re.MULTILINE):
            yield int(match[1]), match[2]


def preprocessed(source: str) -> str:
    """The source with its macros expanded. Includes are left out: Metal's headers are the shim."""
    unexpanded = "".join(f"#undef {name}\n#define {name} {name}\n" for name in VALUES)
    return preprocess(f'{unexpanded}#line 1 "{SOURCE}"\n' + INCLUDE.sub("", source), SOURCE)


def clang(*arguments: str | Path, text: str) -> tuple[str, str]:
    """What clang prints for a text, and its log; that it found errors does not matter."""
    command = [zig(), "clang", *TARGET, *METAL_LANGUAGE, *map(str, arguments), "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    return done.stdout, done.stderr


def precompiled(shim: str) -> Path:
    """The shim's declarations, as clang keeps them."""

    def build(path: Path) -> None:
        _, log = clang("-fsyntax-only", "-Xclang", "-emit-pch", "-Xclang", "-o", "-Xclang", path, text=shim)
        if not path.exists():
            raise ToolError(log)

    return cached("shim", [shim], ".pch", build)


def offset_of(fields: dict[str, Any]) -> int | None:
    """Where a node stands in the text, in bytes."""
    for place in (fields.get("loc", {}), fields.get("range", {}).get("begin", {})):
        if "offset" in place:
            return place["offset"]
    return None


def places(text: str) -> tuple[list[int], list[tuple[str, int]]]:
    """Where each line of a preprocessed text starts, in bytes, and the file and line it came from."""
    starts, places = [], []
    offset, file, line = 0, "", 1
    for content in text.split("\n"):
        starts.append(offset)
        places.append((file, line))
        offset += len(content.encode()) + 1
        line += 1
        if marker := LINE_MARKER.match(content):
            line, file = int(marker[1]), marker[2] or file
    return starts, places
