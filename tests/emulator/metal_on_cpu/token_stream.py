"""A preprocessed source as tokens that can be edited in place."""

from __future__ import annotations

import re
from dataclasses import dataclass

TOKEN = re.compile(
    r"""(?P<marker>^\#[^\n]*)|(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|(?P<word>[A-Za-z_]\w*)"""
    r"""|(?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)|(?P<space>\s+)|(?P<mark>::|->|&&|\|\||<<=|==|!=|<=|>=|.)""",
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)
OPEN = {"(": ")", "[": "]", "{": "}"}


class RewriteError(ValueError):
    """Source that the executor does not take; the text begins with the line."""


@dataclass
class Token:
    text: str
    kind: str
    line: int


def tokenize(text: str) -> list[Token]:
    """Tokens with the line that the preprocessor's markers give them; white space is kept in them."""
    tokens, line = [], 1
    for match in TOKEN.finditer(text):
        kind, piece = str(match.lastgroup), match.group()
        if kind == "marker" and (number := re.match(r"#\s*(?:line\s+)?(\d+)", piece)):
            line = int(number[1]) - 1
        tokens.append(Token(piece, kind, line))
        line += piece.count("\n")
    return tokens


class TokenStream:
    """The tokens of ``text``, by index."""

    def __init__(self, text: str) -> None:
        self.tokens = tokenize(text)

    def next(self, position: int) -> int:
        """The first token from here on that is not white space."""
        while position < len(self.tokens) and self.tokens[position].kind in ("space", "marker"):
            position += 1
        return position

    def previous(self, position: int) -> int:
        while position > 0 and self.tokens[position].kind in ("space", "marker"):
            position -= 1
        return position

    def text(self, position: int) -> str:
        return self.tokens[position].text if position < len(self.tokens) else ""

    def peek(self, position: int) -> str:
        return self.text(self.next(position + 1))

    def join(self, begin: int, end: int) -> str:
        kept = (token.text for token in self.tokens[begin:end] if token.kind != "marker")
        return re.sub(r"\s+", " ", "".join(kept)).strip()

    def after_brackets(self, position: int) -> int:
        """Behind the bracket that closes the one here."""
        depth = 0
        for i in range(position, len(self.tokens)):
            if self.tokens[i].kind == "mark":
                depth += (self.text(i) in OPEN) - (self.text(i) in OPEN.values())
                if depth == 0:
                    return i + 1
        raise self.error(position, f"no bracket closes this {self.text(position)!r}")

    def after_angles(self, position: int) -> int:
        """Behind the > that closes the < here."""
        depth, i = 0, position
        while i < len(self.tokens):
            mark = self.text(i)
            if mark in OPEN:
                i = self.after_brackets(i)
                continue
            depth += (mark == "<") - (mark == ">")
            i += 1
            if depth == 0:
                return i
        raise self.error(position, "no > closes this <")

    def error(self, position: int, message: str) -> RewriteError:
        return RewriteError(f"{self.tokens[position].line}: {message}")

    def blank(self, begin: int, end: int) -> None:
        for token in self.tokens[begin:end]:
            if token.kind != "marker":
                token.text, token.kind = "\n" * token.text.count("\n"), "space"
