"""What clang accepts and Metal refuses.

Two sources of truth, each for what it knows best:

- clang's own syntax tree, for every rule about types, instantiated templates or calls (``Tree`` of ``syntax_tree.py``);
- the words of the source, for what is refused wherever it stands (keywords, attributes, includes, characters) and for
  threadgroup variables: the executor rewrites their declarations before clang's tree is made.

The rules are those of MSL 3.1, a C++14: the oldest language version that PyTorch compiles shaders with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path

from .rewrite import LIMIT
from .syntax_tree import INCLUDE, Node, Tree, preprocessed
from .token_stream import Token, tokenize
from .toolchain import HERE, cached, shim_text


@dataclass(frozen=True, order=True)
class Diagnostic:
    """One refusal: ``rule`` is a key of ``RULES``, ``line`` counts from 1 in the source that was given."""

    line: int
    rule: str
    message: str


RULES = {
    "address-space": "a pointer or reference needs an address space",
    "attribute-call": "Apple's compiler is not known to take a call here: write arithmetic on constants",
    "bfloat": "bfloat converts explicitly only: write bfloat(x)",
    "constant-16-bit": "offsets in constant are multiples of 4 bytes: bind such a tensor as device const",
    "cxx17": "MSL before 4 is C++14",
    "double": "there is no double",
    "exception": "there are no exceptions",
    "function-constant": "PyTorch's library cache cannot set function constants",
    "function-pointer": "there are no function pointers",
    "global": "a program-scope variable lives in the constant address space",
    "goto": "there is no goto",
    "heap": "there is no new or delete",
    "include": "only <metal_*> headers exist when PyTorch compiles the source",
    "lambda": "there are no lambdas",
    "matrix-element": "simdgroup_matrix holds half, bfloat or float",
    "name": "Metal has this name: take another",
    "non-ascii": "PyTorch's compiler takes ASCII only, in comments too",
    "recursion": "a function may not call itself",
    "rtti": "there is no run-time type information",
    "static-local": "a function has no static variables",
    "threadgroup-argument": "PyTorch's dispatch sets no threadgroup memory length: declare an array in the kernel",
    "threadgroup-local": "a threadgroup variable is declared in a kernel",
    "variadic": "there are no variadic functions",
    "virtual": "there are no virtual functions",
}

KEYWORDS = {
    "catch": "exception",
    "delete": "heap",
    "double": "double",
    "dynamic_cast": "rtti",
    "function_constant": "function-constant",
    "goto": "goto",
    "new": "heap",
    "throw": "exception",
    "try": "exception",
    "typeid": "rtti",
    "virtual": "virtual",
}

METAL_NAMES = Path(__file__).with_name("metal_names.tsv")
NAMESPACES = {"TranslationUnitDecl", "NamespaceDecl", "LinkageSpecDecl"}
DEFINE = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)", re.MULTILINE)

THREADGROUP_ARGUMENT = re.compile(r"\bthreadgroup\b([^,()]*)\[\[\s*threadgroup\s*\(\s*\w+\s*\)\s*\]\]")
ATTRIBUTE = re.compile(r"\[ \[ .*? \] \]|__attribute__ \( \( .*? \) \)")
FUNCTION_POINTER = re.compile(r"\((?:\w+::|__generic )?[*&][\w ]*\)\(")


def lint(source: str) -> list[Diagnostic]:
    """Every rule broken by ``source``, in the order of its lines; from the cache if it was linted before."""

    def build(path: Path) -> None:
        path.write_text(json.dumps([astuple(found) for found in diagnostics(source)]))

    path = cached("lint", [source, tool_text(), shim_text()], ".json", build)
    return [Diagnostic(*found) for found in json.loads(path.read_text())]


@cache
def tool_text() -> str:
    """All that a source's diagnostics depend on, but for the compiler and the shim."""
    return "\0".join(file.read_text() for file in [*sorted(HERE.glob("*.py")), METAL_NAMES])


def diagnostics(source: str) -> list[Diagnostic]:
    text = preprocessed(source)
    tokens = [token for token in tokenize(text) if token.kind not in ("space", "marker")]
    tree = Tree(THREADGROUP_ARGUMENT.sub(r"device\1", text))  # the executor does not read such a parameter
    found = {*non_ascii(source), *includes(source), *words(tokens), *threadgroup_locals(tokens)}
    found |= {*attribute_calls(tokens), *macro_names(source), *names(tree)}
    found |= {*cxx17(tree), *declarations(tree), *conversions(tree), *recursion(tree)}
    found |= {*narrow_constants(tree, {function.name for function in functions(tokens) if function.is_kernel})}
    return sorted(found)


def broken(rule: str, line: int, what: str) -> Diagnostic:
    return Diagnostic(line, rule, f"{what}: {RULES[rule]}")


@cache
def metal_names() -> dict[str, set[str]]:
    """The scopes of each name of Metal's; macros and keywords have scopes of that name."""
    scopes: dict[str, set[str]] = {}
    for line in METAL_NAMES.read_text().splitlines():
        if not line.startswith("#"):
            name, _, scope, _ = line.split("\t")
            scopes.setdefault(name, set()).add(scope)
    return scopes


# ---- by characters and words


def non_ascii(source: str) -> Iterator[Diagnostic]:
    for number, line in enumerate(source.split("\n"), 1):
        if strange := next((character for character in line if not character.isascii()), None):
            yield broken("non-ascii", number, ascii(strange))


def includes(source: str) -> Iterator[Diagnostic]:
    for match in INCLUDE.finditer(source):
        if not re.match(r"<metal_\w+>", match[1]):
            yield broken("include", 1 + source.count("\n", 0, match.start()), match[0].strip())


def macro_names(source: str) -> Iterator[Diagnostic]:
    for match in DEFINE.finditer(source):
        if match[1] in metal_names():
            yield broken("name", 1 + source.count("\n", 0, match.start()), f"#define {match[1]}")


def attribute_calls(tokens: list[Token]) -> Iterator[Diagnostic]:
    """Calls in the arguments of max_total_threads_per_threadgroup."""
    for i, token in enumerate(tokens):
        if token.text != "max_total_threads_per_threadgroup":
            continue
        depth = 0
        for before, mark in zip(tokens[i + 1 :], tokens[i + 2 :], strict=False):
            depth += (before.text == "(") - (before.text == ")")
            if depth == 0:
                break
            if mark.text == "(" and (before.kind == "word" or before.text == ">"):
                yield broken("attribute-call", mark.line, before.text)


def words(tokens: list[Token]) -> Iterator[Diagnostic]:
    for i, token in enumerate(tokens):
        before, after = (tokens[j].text if 0 <= j < len(tokens) else "" for j in (i - 1, i + 1))
        deleted_function = token.text == "delete" and before == "="
        if token.text in KEYWORDS and not deleted_function:
            yield broken(KEYWORDS[token.text], token.line, token.text)
        if token.text == "threadgroup" and before == "[" and after == "(":
            yield broken("threadgroup-argument", token.line, "[[threadgroup(n)]]")


@dataclass(frozen=True)
class Function:
    """A function definition: its name and the tokens of its body."""

    name: str
    is_kernel: bool
    body: list[Token]


def functions(tokens: list[Token]) -> Iterator[Function]:
    """The function definitions of a source, those in namespaces and classes included."""
    head: list[str] = []
    i = 0
    while i < len(tokens):
        text = tokens[i].text
        if text != "{":
            head = [] if text in (";", "}") else [*head, text]
            i += 1
        elif name := function_name(head):
            end = closing_brace(tokens, i)
            yield Function(name, "kernel" in head, tokens[i + 1 : end])
            head, i = [], end + 1
        else:
            head, i = [], i + 1


def function_name(head: list[str]) -> str | None:
    """The function that these words in front of a brace define, None for a scope or an initialiser."""
    declaration = ATTRIBUTE.sub("", " ".join(without_template(head)))
    function = re.search(r"(\w+) \(", declaration)
    while declaration != (flat := re.sub(r"\([^()]*\)", "", declaration)):
        declaration = flat
    is_other = re.search(r"\b(struct|class|union|enum|namespace)\b|(?<!operator )=", declaration)
    return function[1] if function and not is_other else None


def closing_brace(tokens: list[Token], opening: int) -> int:
    depth = 0
    for i in range(opening, len(tokens)):
        depth += (tokens[i].text == "{") - (tokens[i].text == "}")
        if depth == 0:
            return i
    return len(tokens)


def without_template(head: list[str]) -> list[str]:
    """``head`` after its ``template <...>`` introducers."""
    while head[:2] == ["template", "<"]:
        depth, length = 1, 2
        while depth and length < len(head):
            depth += (head[length] == "<") - (head[length] == ">")
            length += 1
        head = head[length:]
    return head


def threadgroup_locals(tokens: list[Token]) -> Iterator[Diagnostic]:
    for function in functions(tokens):
        for i, token in enumerate(function.body):
            if token.text != "threadgroup" or function.is_kernel:
                continue
            follows = [after.text for after in function.body[i + 1 :]]
            end = next((j for j, text in enumerate(follows) if text in ("[", ";", "=", "*", "&", ")", "{")), 0)
            starts_statement = i == 0 or function.body[i - 1].text in (";", "{", "}")
            if starts_statement and follows[end] not in ("*", "&"):
                yield broken("threadgroup-local", token.line, f"{follows[end - 1]} in {function.name}")


# ---- by clang's syntax tree


def cxx17(tree: Tree) -> Iterator[Diagnostic]:
    for line, message in tree.warnings("pre-c++17-compat"):
        yield broken("cxx17", line, message.removesuffix(" is incompatible with C++ standards before C++17"))


def declarations(tree: Tree) -> Iterator[Diagnostic]:
    for node in tree:
        if node.is_implicit:
            continue
        if node.kind in ("VarDecl", "ParmVarDecl", "FieldDecl"):
            yield from variable(node)
        elif node.kind in ("FunctionDecl", "CXXMethodDecl"):
            if node["variadic"]:
                yield broken("variadic", node.line, node.name)
            if "__generic" in node.type.partition("(")[0]:
                yield broken("address-space", node.line, f"what {node.name} returns")
        elif node.kind == "LambdaExpr":
            yield broken("lambda", node.line, "lambda")
        elif node.takes_function_address:
            yield broken("function-pointer", node.line, "address of a function")


def names(tree: Tree) -> Iterator[Diagnostic]:
    for node in tree:
        if node.is_implicit or not node.name or not node.kind.endswith("Decl"):
            continue
        scopes = metal_names().get(node.name, set())
        if scopes & {"macro", "keyword"} or (scopes & {"metal", "global"} and at_namespace_scope(node)):
            yield broken("name", node.line, node.name)


def at_namespace_scope(node: Node) -> bool:
    """Whether a declaration's name belongs to a namespace or to the file; an enumerator's does if its enum's does."""
    parent = node.parent
    if parent is None:
        return False
    if parent.kind == "EnumDecl" and not parent["scopedEnumTag"]:
        return at_namespace_scope(parent)
    return parent.kind in NAMESPACES


def outside_namespaces(source: str) -> list[tuple[int, str]]:
    """Line and name of what a source declares in no namespace."""
    tree = Tree(preprocessed(source))
    found = {
        (node.line, node.name)
        for node in tree
        if node.parent and node.parent.kind == "TranslationUnitDecl" and node.name and node.kind != "NamespaceDecl"
        if not node.name.startswith(LIMIT) and node.kind != "UsingDirectiveDecl"
    }
    return sorted(found)


def variable(node: Node) -> Iterator[Diagnostic]:
    if FUNCTION_POINTER.search(node.type):
        yield broken("function-pointer", node.line, node.name or "parameter")
    elif "__generic" in node.type:
        yield broken("address-space", node.line, node.name or "parameter")
    if element := re.search(r"simdgroup_matrix<((?:unsigned )?(?:bool|char|short|int|long))\b", node.type):
        yield broken("matrix-element", node.line, element[1])
    if node.kind == "VarDecl" and "__constant" not in node.type:
        if not node.in_function:
            yield broken("global", node.line, node.name)
        elif node["storageClass"] == "static":
            yield broken("static-local", node.line, node.name)


def conversions(tree: Tree) -> Iterator[Diagnostic]:
    for node in tree:
        if not node.type.endswith("__bf16"):
            continue
        implicit_cast = node.kind == "ImplicitCastExpr" and not node["isPartOfExplicitCast"]
        if implicit_cast and node["castKind"] == "FloatingCast":
            yield broken("bfloat", node.line, f"from {node.children[0].type.split()[-1]}")
        if node.kind == "CompoundAssignOperator" and node["computeResultType"]["qualType"] == "float":
            yield broken("bfloat", node.line, f"{node['opcode']} computes in float")


def recursion(tree: Tree) -> Iterator[Diagnostic]:
    calls: dict[str, set[str]] = {}
    for node in tree:
        if node.callee and node.in_function:
            calls.setdefault(tree.first(node.in_function), set()).add(tree.first(node.callee))

    def reaches(start: str, goal: str) -> bool:
        seen: set[str] = set()
        front = [start]
        while front:
            function = front.pop()
            if function == goal:
                return True
            if function not in seen:
                seen.add(function)
                front.extend(calls.get(function, ()))
        return False

    for node in tree:
        if node.callee and node.in_function and reaches(tree.first(node.callee), tree.first(node.in_function)):
            yield broken("recursion", node.line, f"call of {node.callee_name}")


def narrow_constants(tree: Tree, kernels: set[str]) -> Iterator[Diagnostic]:
    for node in tree:
        if node.kind == "FunctionDecl" and node.name in kernels:
            for parameter in node.children:
                if parameter.kind == "ParmVarDecl" and re.search(
                    r"__constant (half|__bf16|bool|(un)?signed char|char|(unsigned )?short) \*", parameter.type
                ):
                    yield broken("constant-16-bit", parameter.line, parameter.name)
