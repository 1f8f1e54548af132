"""Where one SQL statement ends and the next begins, in text that may still be growing."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

#: What a semicolon may stand in without ending a statement, and the semicolon. An opening without its closing matches
#: to the end of the text: the statement goes on. Block comments nest, so only their opening is here.
_PIECES = re.compile(
    r"""
    (?P<quoted> '(?:[^']|'')*(?:'|\Z) | "(?:[^"]|"")*(?:"|\Z) )
    | (?P<escaped> \b[eE]'(?:[^'\\]|''|\\.)*(?:'|\Z) )
    | (?P<dollar> \$(?P<tag>(?:[A-Za-z_\x80-\U0010ffff][\w\x80-\U0010ffff]*)?)\$ (?:.*?\$(?P=tag)\$ | .*\Z) )
    | (?P<line> --[^\n]* )
    | (?P<block> /\* )
    | (?P<end> ; )
    """,
    re.VERBOSE | re.DOTALL,
)
_BORDERS = re.compile(r"/\*|\*/")


@dataclass(frozen=True)
class Statement:
    """A statement without its semicolon and the line of the text, from 1, on which it begins."""

    text: str
    line: int


def split(text: str) -> tuple[list[Statement], str]:
    """The statements of `text` that a semicolon ends, and what follows the last of them, without whole line comments.

    Comments alone are no statement.
    """
    found, start, bare = [], 0, ""
    for kind, piece_start, piece_end in _pieces(text):
        if kind == "end":
            if bare.strip():
                first = start + len(text[start:]) - len(text[start:].lstrip())
                found.append(Statement(text[first:piece_start].strip(), text.count("\n", 0, first) + 1))
            start, bare = piece_end, ""
        elif kind != "comment":
            bare += text[piece_start:piece_end]
    rest = text[start:]
    is_over = not bare.strip() and rest.endswith("\n") and "/*" not in rest
    return found, "" if is_over else rest


def split_all(text: str) -> list[Statement]:
    """Every statement of `text`; the last one needs no semicolon."""
    found, rest = split(text)
    more, _ = split(f"{rest}\n;") if rest.strip() else ([], "")
    line = text.count("\n", 0, len(text) - len(rest))
    return found + [Statement(s.text, s.line + line) for s in more]


def _pieces(text: str) -> Iterator[tuple[str, int, int]]:
    """(kind, start, end) of everything in `text`, kind is "end", "comment" or "text"."""
    at = 0
    while at < len(text):
        found = _PIECES.search(text, at)
        if found is None:
            yield "text", at, len(text)
            return
        if found.start() > at:
            yield "text", at, found.start()
        end = _end_of_block(text, found.end()) if found["block"] else found.end()
        kind = "end" if found["end"] else "comment" if found["line"] or found["block"] else "text"
        yield kind, found.start(), end
        at = end


def _end_of_block(text: str, at: int) -> int:
    depth = 1
    while depth:
        found = _BORDERS.search(text, at)
        if found is None:
            return len(text)
        depth, at = depth + (1 if found[0] == "/*" else -1), found.end()
    return at
