"""Metal source as tokens."""

from __future__ import annotations

import re
from typing import NamedTuple

PATTERN = re.compile(
    r"""(?P<skip>//(?:\\\n|[^\n])*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|\\\n|[^\S\n]+)"""
    r"""|(?P<newline>\n)|(?P<token>[A-Za-z_]\w*|\.?\d(?:[eEpP][+-]|[\w.])*|::|->|.)""",
    re.DOTALL,
)


class Token(NamedTuple):
    text: str
    line: int
    in_directive: bool


def tokenise(source: str) -> list[Token]:
    """The words, numbers and punctuation of ``source``, one character of punctuation a token but for :: and ->.

    Comments, strings and white space are dropped. ``>>`` stays two tokens, as template lists need.
    """
    tokens: list[Token] = []
    line, in_directive, at_line_start = 1, False, True
    for match in PATTERN.finditer(source):
        if match.lastgroup == "token":
            in_directive = in_directive or (at_line_start and match[0] == "#")
            at_line_start = False
            tokens.append(Token(match[0], line, in_directive))
        elif match.lastgroup == "newline":
            in_directive, at_line_start = False, True
        line += match[0].count("\n")
    return tokens
