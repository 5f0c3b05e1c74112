"""The commands and files of README.md's "Two real hosts in ten minutes": what the lab executes.

A block is found by words in it. What a lab must do otherwise is a replacement of exact text, which fails when
the text is not there any more, so that the two cannot drift apart unnoticed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

README = Path(__file__).resolve().parents[2] / "README.md"
HEADING = "## Two real hosts in ten minutes\n"

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@frozen
class Block:
    """What stands between two fences, and the language behind the first."""

    language: str
    text: str


def blocks() -> list[Block]:
    """All blocks of the section, in order."""
    _, heading, rest = README.read_text("utf-8").partition(HEADING)
    if not heading:
        raise LookupError(f"README.md has no heading {HEADING.strip()!r}")
    section = rest.partition("\n## ")[0]
    return [Block(*found) for found in _BLOCK.findall(section)]


def block(language: str, words: str, replace: Mapping[str, str] | None = None) -> str:
    """The text of the one block of `language` with `words` in it, each key of `replace` replaced."""
    found = [one.text for one in blocks() if one.language == language and words in one.text]
    if len(found) != 1:
        raise LookupError(f"README.md has {len(found)} {language} blocks with {words!r}")
    (text,) = found
    for old, new in (replace or {}).items():
        if old not in text:
            raise LookupError(f"README.md says nothing like {old!r} in the block with {words!r}")
        text = text.replace(old, new)
    return text


def file(column: int, words: str) -> tuple[str, str]:
    """Path and contents of the file in a toml block; `column` 0 is alpha's, 1 is beta's.

    The two stand side by side, beta's as comments; what is in parentheses is for the reader.
    """
    columns = [re.split(r"\s+#\s", line) for line in block("toml", words).splitlines()]
    lines = [line[column].strip() if len(line) > column else "" for line in columns]
    head, *keys = lines
    path = head.rpartition(": ")[2]
    if not path.startswith("/etc/"):
        raise LookupError(f"README.md names no file in {head!r}")
    return path, "".join(f"{key}\n" for key in keys if key and not key.startswith("("))
