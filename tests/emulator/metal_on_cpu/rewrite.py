"""From Metal to what clang's OpenCL C++ takes, token by token; every token stays on its line.

Attributes are read and removed. Each kernel becomes a plain function and gets a launcher. A threadgroup variable
becomes a reference into the runtime's arena. Vector constructors and casts between vectors become calls of the shim.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from .token_stream import Token, TokenStream

VECTOR_NAME = re.compile(
    r"(packed_)?(char|uchar|short|ushort|int|uint|long|ulong|half|bfloat|float)[234]|(float|half|bfloat)8x8"
)
# Names that OpenCL reserves and Metal does not.
RESERVED = {"global", "local", "generic", "private_", "pipe", "read_only", "write_only", "read_write", "event_t"}
LIMIT = "metal_limit_"  # begins the name of the struct that holds a kernel's limit of threads
BUILTIN_SOURCES = {
    f"thread{rest}"
    for rest in ("_position_in_grid", "_position_in_threadgroup", "_index_in_threadgroup", "_index_in_simdgroup")
} | {
    *("threadgroup_position_in_grid", "threads_per_threadgroup", "dispatch_threads_per_threadgroup"),
    *("threadgroups_per_grid", "threads_per_grid", "simdgroup_index_in_threadgroup", "simdgroups_per_threadgroup"),
    *("dispatch_simdgroups_per_threadgroup", "threads_per_simdgroup", "thread_execution_width"),
}


@dataclass
class Argument:
    """A kernel parameter that is bound to a buffer."""

    index: int
    name: str
    space: str
    type: str


@dataclass
class Entry:
    """A launcher: one non-template kernel, or one instantiation."""

    symbol: str
    arguments: list[Argument]
    line: int


@dataclass
class Rewritten:
    text: str
    entries: dict[str, Entry] = field(default_factory=dict)
    variables: list[tuple[str, int]] = field(default_factory=list)  # threadgroup variables by site: name and line


@dataclass
class Kernel:
    name: str
    sources: list[str]
    arguments: list[Argument]
    is_template: bool


def enumerators(source: TokenStream) -> dict[str, int | None]:
    """The enumerators of a source; None for one whose value is neither a number, nor another enumerator, nor a product
    of these, and for one that two enums define otherwise."""
    found: dict[str, int | None] = {}
    for i, token in enumerate(source.tokens):
        if token.text != "enum":
            continue
        brace = next((j for j in range(i, len(source.tokens)) if source.text(j) in ("{", ";")), i)
        if source.text(brace) != "{" or source.peek(i) in ("class", "struct"):
            continue
        value: int | None = -1
        for part in source.join(brace + 1, source.after_brackets(brace) - 1).split(","):
            name, *initialiser = part.replace(" ", "").split("=")
            if initialiser:
                factors = [int(text) if text.isdigit() else found.get(text) for text in initialiser[0].split("*")]
                known = [factor for factor in factors if factor is not None]
                value = math.prod(known) if known == factors else None
            elif value is not None:
                value += 1
            if name:
                found[name] = value if found.get(name, value) == value else None
    return found


class Rewriter(TokenStream):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.attributes: dict[int, list[tuple[str, str]]] = {}  # by the index of the token that follows them
        self.enumerators = enumerators(self)
        self.kernels: dict[str, Kernel] = {}  # by qualified name
        self.namespaces: list[tuple[range, str]] = []
        self.result = Rewritten("")

    def run(self) -> Rewritten:
        self.take_attributes()
        self.rename_reserved()
        constructors = self.type_names()
        position = 0
        while position < len(self.tokens):
            token = self.tokens[position]
            if token.kind == "word":
                if self.has_attribute(position, "kernel") or token.text in ("kernel", "__kernel"):
                    self.take_kernel(position)
                elif token.text == "template" and self.peek(position) != "<":
                    self.take_instantiation(position)
                elif token.text == "namespace" and self.text(self.next(self.next(position + 1) + 1)) == "{":
                    brace = self.next(self.next(position + 1) + 1)
                    self.namespaces.append((range(brace, self.after_brackets(brace)), self.peek(position)))
                elif token.text == "threadgroup":
                    self.take_threadgroup_variable(position)
                elif token.text == "static_cast":
                    self.take_cast(position)
                elif token.text in constructors or VECTOR_NAME.fullmatch(token.text):
                    self.take_constructor(position, position + 1)
                elif token.text == "vec" and self.peek(position) == "<":
                    self.take_constructor(position, self.after_angles(self.next(position + 1)))
            position += 1
        self.result.text = "".join(token.text for token in self.tokens)
        return self.result

    def has_attribute(self, position: int, name: str) -> bool:
        return any(name == found for found, _ in self.attributes.get(position, ()))

    def scope(self, position: int) -> list[str]:
        """The names of the namespaces around a token, the outermost first."""
        return [name for inside, name in self.namespaces if position in inside]

    # Rewriting

    def take_attributes(self) -> None:
        """Remove each [[…]] and note what it says."""
        taken = []
        position = 0
        while position < len(self.tokens):
            if self.text(position) == "[" and self.text(position + 1) == "[":
                end = self.after_brackets(position)
                found = re.findall(
                    r"(?:\w+::)?(\w+)(?:\s*\(((?:[^()]|\([^()]*\))*)\))?", self.join(position + 2, end - 2)
                )
                self.blank(position, end)
                taken.append((end, found))
                position = end - 1
            position += 1
        for end, found in taken:
            self.attributes.setdefault(self.next(end), []).extend((name, value.strip()) for name, value in found)

    def rename_reserved(self) -> None:
        for token in self.tokens:
            if token.kind == "word" and token.text in RESERVED:
                token.text += "_"

    def type_names(self) -> set[str]:
        """Names after which a parenthesis is a conversion: template type parameters and aliases of types."""
        names = set()
        for i, token in enumerate(self.tokens):
            following = self.tokens[self.next(i + 1)].text if self.next(i + 1) < len(self.tokens) else ""
            before = self.text(self.previous(i - 1)) if i else ""
            if (token.text in ("typename", "class") and before in ("<", ",")) or (
                token.text == "using" and self.peek(self.next(i + 1)) == "="
            ):
                names.add(following)
            elif token.text == "typedef":
                end = next(j for j in range(i, len(self.tokens)) if self.text(j) == ";")
                names.add(self.text(self.previous(end - 1)))
        return {name for name in names if name.isidentifier()}

    def take_constructor(self, begin: int, end: int) -> None:
        """T(…) in an expression: metal::executor::make<T>(…)."""
        paren = self.next(end)
        inside = self.peek(paren)
        before = self.text(self.previous(begin - 1)) if begin else ""
        if self.text(paren) != "(" or inside in ("&", "*") or before in ("operator", "~", "typename", "class", "using"):
            return
        qualified = before == "::" and self.text(self.previous(self.previous(begin - 1) - 1)) == "metal"
        self.tokens[begin].text = f"{'' if qualified else 'metal::'}executor::make<{self.text(begin)}"
        self.tokens[end - 1].text += ">"

    def take_cast(self, position: int) -> None:
        """static_cast between values: it may be one between vectors."""
        begin = self.next(position + 1)
        target = self.join(begin + 1, self.after_angles(begin) - 1)
        if not re.search(r"[*&]|\bauto\b", target):
            self.tokens[position].text = "metal::executor::cast"

    def take_threadgroup_variable(self, position: int) -> None:
        """threadgroup T name[N], …; : references into the runtime's arena."""
        end = position
        while self.text(end) not in (";", "=", "*", "&", ")", "{", "(", ""):
            end = self.after_brackets(end) if self.text(end) == "[" else end + 1
            if self.text(end) == "<":
                end = self.after_angles(end)
        if self.text(end) != ";":
            return
        declaration = self.join(position + 1, end)
        parts = re.match(
            r"((?:(?:const|volatile|typename)\s+)*[\w:]+\s*(?:<.*>(?:::\w+)?)?)\s+(\w+\s*(?:\[.*)?(?:,.*)?)$",
            declaration,
        )
        parts = parts or re.match(r"(.*>)\s*(\w+\s*(?:\[.*)?)$", declaration)
        if not parts:
            raise self.error(position, f"cannot read this threadgroup variable: {declaration}")
        replacement = []
        for name, extents in re.findall(r"(\w+)\s*((?:\[(?:[^\[\]]|\[[^\[\]]*\])*\]\s*)*)(?:,|$)", parts[2]):
            site = len(self.result.variables)
            self.result.variables.append((name, self.tokens[position].line))
            replacement.append(
                f"threadgroup auto& {name} = metal::executor::threadgroup_variable<{parts[1]}{extents}, {site}>();"
            )
        self.blank(position + 1, end)
        self.tokens[position] = Token(" ".join(replacement), "code", self.tokens[position].line)
        self.tokens[end].text = ""

    # Kernels

    def take_kernel(self, position: int) -> None:
        """A kernel's definition: blank what makes it one, and put launchers behind it unless it is a template."""
        host_names = [value for name, value in self.attributes.get(position, ()) if name == "host_name"]
        limits = [value for name, value in self.attributes.get(position, ()) if name.startswith("max_total_threads")]
        if self.text(position) in ("kernel", "__kernel"):
            self.blank(position, position + 1)
            position = self.next(position)
            limits += [
                value for name, value in self.attributes.get(position, ()) if name.startswith("max_total_threads")
            ]
            host_names += [value for name, value in self.attributes.get(position, ()) if name == "host_name"]
        paren = next(i for i in range(position, len(self.tokens)) if self.text(i) == "(")
        name = self.text(self.previous(paren - 1))
        end = self.after_brackets(paren)
        body = self.next(end)
        limits += [value for found, value in self.attributes.get(body, ()) if found.startswith("max_total_threads")]
        header = self.template_header(position)
        sources, arguments = self.parameters(paren, end)
        kernel = Kernel(name, sources, arguments, header is not None)
        self.kernels["::".join([*self.scope(position), name])] = kernel
        start = position if header is None else header[0]
        prefix = "" if header is None else self.join(*header)
        limit = limits[0] if limits else "1024"
        before = f"{prefix} struct {LIMIT}{name} {{ enum : uint {{ value = {limit} }}; }}; "
        self.tokens[start].text = before + self.tokens[start].text
        if self.text(body) == ";":
            return
        if header is None:
            close = self.after_brackets(body)
            self.tokens[close - 1].text += self.launcher(
                kernel, name, f"{LIMIT}{name}", host_names[0].strip('"') if host_names else name, position
            )

    def template_header(self, position: int) -> tuple[int, int] | None:
        """The range of `template <…>` that ends right before this token."""
        end = self.previous(position - 1) if position else 0
        if self.text(end) != ">":
            return None
        for begin in range(end, -1, -1):
            if self.text(begin) == "template" and self.peek(begin) == "<":
                if self.after_angles(self.next(begin + 1)) == end + 1:
                    return begin, end + 1
                return None
        return None

    def parameters(self, paren: int, end: int) -> tuple[list[str], list[Argument]]:
        """Of each parameter its source, and the buffer arguments; without an attribute the next free index."""
        sources: list[str] = []
        arguments: list[Argument] = []
        used: set[int] = set()
        begin, position = self.next(paren + 1), self.next(paren + 1)
        if position >= end - 1:
            return [], []
        pending = []
        while position < end:
            mark = self.text(position)
            if mark == "<":
                position = self.after_angles(position)
            elif mark in ("(", "["):
                position = self.after_brackets(position)
            elif mark == "," or position == end - 1:
                pending.append((begin, position, dict(self.attributes.get(position, ()))))
                begin = position = self.next(position + 1)
            else:
                position += 1
        used = {self.buffer_index(first, found["buffer"]) for first, _, found in pending if "buffer" in found}
        for first, last, found in pending:
            declaration = self.join(first, last)
            builtin = next((name for name in found if name in BUILTIN_SOURCES), None)
            if builtin:
                sources.append(builtin)
                continue
            if unknown := set(found) - {"buffer", "maybe_unused"}:
                raise self.error(first, f"unsupported parameter attribute [[{sorted(unknown)[0]}]]")
            free = min(set(range(len(used) + 1)) - used)
            index = self.buffer_index(first, found["buffer"]) if "buffer" in found else free
            if "buffer" in found and index in [argument.index for argument in arguments]:
                raise self.error(first, f"two parameters have buffer index {index}")
            used.add(index)
            if index >= 31:
                raise self.error(first, f"buffer index {index}: Metal has 31 (0 to 30)")
            space = re.search(r"\b(device|constant|threadgroup)\b", declaration)
            if not space or space[1] == "threadgroup":
                raise self.error(first, f"parameter needs an attribute or a device or constant pointer: {declaration}")
            name = re.search(r"(\w+)$", declaration)
            type_name = re.sub(r"\b(device|constant)\b|[*&]\s*\w*$", "", declaration)
            arguments.append(Argument(index, name[1] if name else "", space[1], re.sub(r"\s+", " ", type_name).strip()))
            sources.append(str(index))
        return sources, arguments

    def buffer_index(self, position: int, text: str) -> int:
        index = int(text) if text.isdigit() else self.enumerators.get(text)
        if index is None:
            raise self.error(position, f"a buffer index is a number or an enumerator of one meaning, not {text!r}")
        return index

    def take_instantiation(self, position: int) -> None:
        """template [[host_name("x")]] [[kernel]] decltype(f<…>) f<…>; becomes a launcher."""
        begin = self.next(position + 1)
        attributes = dict(self.attributes.get(begin, ()))
        end = next(i for i in range(position, len(self.tokens)) if self.text(i) in (";", "{"))
        if "host_name" not in attributes or self.text(end) != ";":
            return
        body = self.join(begin, end)
        if body.startswith("decltype"):
            function = self.join(self.after_brackets(self.next(begin + 1)), end)
        else:  # template [[host_name("x")]] [[kernel]] void f<…>(…);
            function = re.sub(r"^(kernel\s+)?void\s+", "", body)
            function = function[: self.end_of_arguments(function)]
        function = function.removeprefix("::")
        name = re.match(r"((?:\w+::)*)(\w+)", function)
        scope = self.scope(position)
        candidates = ["::".join([*scope[:depth], name[0]]) for depth in range(len(scope), -1, -1)] if name else []
        kernel = next((self.kernels[found] for found in candidates if found in self.kernels), None)
        if not name or not kernel:
            raise self.error(begin, f"no kernel is defined before this instantiation: {function}")
        limit = f"{name[1]}{LIMIT}{function[len(name[1]) :]}"
        text = self.launcher(kernel, function, limit, attributes["host_name"].strip('"'), position)
        self.blank(position, end + 1)
        self.tokens[position] = Token(text, "code", self.tokens[position].line)

    @staticmethod
    def end_of_arguments(function: str) -> int:
        depth = 0
        for i, letter in enumerate(function):
            depth += (letter == "<") - (letter == ">")
            if letter == ">" and depth == 0:
                return i + 1
        return len(function)

    def launcher(self, kernel: Kernel, function: str, limit: str, host_name: str, position: int) -> str:
        if host_name in self.result.entries:
            raise self.error(position, f"two kernels are named {host_name!r}")
        if not self.scope(position):
            function = f"::{function}"  # not a function of namespace metal that has the same name
        symbol = f"metal_kernel_{len(self.result.entries)}"
        line = self.tokens[position].line
        self.result.entries[host_name] = Entry(symbol, sorted(kernel.arguments, key=lambda a: a.index), line)
        pointers = ' _Pragma("OPENCL EXTENSION __cl_clang_function_pointers : {}")'
        launcher = self.launcher_text(kernel, function, limit, symbol, host_name)
        return f"{pointers.format('enable')} {launcher} {pointers.format('disable')}"

    def launcher_text(self, kernel: Kernel, function: str, limit: str, symbol: str, host_name: str) -> str:
        """The functions that a library exports for one kernel; another executor has others."""
        sources = ", ".join(kernel.sources)
        return (
            f'extern "C" void {symbol}(const ExecutorThread* t)'
            f" {{ metal::executor::launch<{sources}>({function}, t); }}"
            f' extern "C" uint {symbol}_describe(ExecutorParameter* p)'
            f" {{ metal::executor::describe_all<{sources}>({function}, p); return {limit}::value; }}"
        )
