"""What the value of a configuration key may be: each kind turns a TOML value into ours, or says what is
wrong.

A kind's `read` raises ValueError with a clause that fits after "path: key: ". `describe` says the same ahead
of time, for the reference.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

import attrs
from attrs import frozen

from curling_fd.units import format_duration, format_size, parse_duration, parse_size

T_co = TypeVar("T_co", covariant=True)

NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}")
"""The names of VMs and hosts."""

_SOCKET_PATH_LIMIT = 107  # sizeof(sun_path) less the NUL, unix(7)


@frozen
class Address:
    """A host (a name or a literal) and a TCP port; `str()` gives "HOST:PORT", IPv6 in brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Kind(Protocol[T_co]):
    """A kind of value."""

    def read(self, value: Any) -> T_co:
        """Turn a TOML value into ours.

        Raises:
            ValueError: saying what is wrong with it.
        """

    def describe(self) -> str:
        """Say in a few words what is right."""


@frozen
class Flag:
    """true or false."""

    def read(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"{show(value)} is not true or false")
        return value

    def describe(self) -> str:
        return "true or false"


@frozen
class Number:
    """A whole number in a range."""

    least: int
    most: int

    def read(self, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{show(value)} is not a whole number")
        if not self.least <= value <= self.most:
            raise ValueError(f"{value} is not from {self.least} to {self.most}")
        return value

    def describe(self) -> str:
        return f"whole number from {self.least} to {self.most}"


@frozen
class Duration:
    """Seconds, written with a unit."""

    least: float
    most: float

    def read(self, value: Any) -> float:
        seconds = parse_duration(_text(value, 'a duration like "500ms" or "1.5s"'))
        if not self.least <= seconds <= self.most:
            raise ValueError(f"{value} is not {self._range()}")
        return seconds

    def describe(self) -> str:
        return f'duration like "500ms" or "1.5s", {self._range()}'

    def _range(self) -> str:
        return f"from {format_duration(self.least)} to {format_duration(self.most)}"


@frozen
class Size:
    """Bytes, written with a unit or as a whole number."""

    least: int
    most: int

    def read(self, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            value = _text(value, 'a size like "512MiB" or a whole number of bytes')
        size = parse_size(value)
        if not self.least <= size <= self.most:
            raise ValueError(f"{value} is not {self._range()}")
        return size

    def describe(self) -> str:
        return f'size like "512MiB", or bytes as a whole number; {self._range()}'

    def _range(self) -> str:
        return f"from {format_size(self.least)} to {format_size(self.most)}"


@frozen
class Rate:
    """Bytes a second, written as a size and "/s"."""

    least: int
    most: int

    def read(self, value: Any) -> int:
        text = _text(value, 'a speed like "100MiB/s"')
        size, slash, unit = text.partition("/")
        if not slash or unit.strip() != "s":
            raise ValueError(f"{text!r} is not a speed like 100MiB/s: write /s after the size")
        rate = parse_size(size)
        if not self.least <= rate <= self.most:
            raise ValueError(f"{value} is not {self._range()}")
        return rate

    def describe(self) -> str:
        return f'speed like "100MiB/s", {self._range()}'

    def _range(self) -> str:
        return f"from {format_size(self.least)}/s to {format_size(self.most)}/s"


@frozen
class Choice:
    """One of some words."""

    words: tuple[str, ...]

    def read(self, value: Any) -> str:
        if value not in self.words:
            raise ValueError(f"{show(value)} is not one of {', '.join(self.words)}")
        return str(value)

    def describe(self) -> str:
        return "one of " + ", ".join(f'"{word}"' for word in self.words)


@frozen
class Name:
    """A name that is safe in paths, logs and messages."""

    def read(self, value: Any) -> str:
        text = _text(value, "a name")
        if not NAME.fullmatch(text):
            raise ValueError(
                f"{text!r} is not 1 to 64 letters, digits, '.', '_' and '-' that begin with a letter or digit"
            )
        return text

    def describe(self) -> str:
        return "1 to 64 letters, digits, `.`, `_`, `-`"


@frozen
class Word:
    """Any text that is not empty."""

    what: str

    def read(self, value: Any) -> str:
        text = _text(value, self.what)
        if not text or "\0" in text:
            raise ValueError(f"{text!r} is not {self.what}")
        return text

    def describe(self) -> str:
        return self.what


@frozen
class AbsolutePath:
    """A path that begins with /; it need not exist yet."""

    socket: bool = False

    def read(self, value: Any) -> str:
        text = _text(value, "a path")
        if not os.path.isabs(text) or "\0" in text:
            raise ValueError(f"{text!r} is not an absolute path")
        length = len(os.fsencode(text))
        if self.socket and length > _SOCKET_PATH_LIMIT:
            raise ValueError(
                f"a UNIX socket's path has at most {_SOCKET_PATH_LIMIT} bytes, this has {length}"
            )
        return text

    def describe(self) -> str:
        return "absolute path of a UNIX socket" if self.socket else "absolute path"


@frozen
class HostPort:
    """HOST:PORT; HOST is a name, an IPv4 address, or an IPv6 address in brackets."""

    def read(self, value: Any) -> Address:
        text = _text(value, '"HOST:PORT"')
        match = re.fullmatch(
            r"(?:\[(?P<six>[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|(?P<host>[\w.-]+)):(?P<port>[0-9]{1,5})", text, re.A
        )
        if match is None:
            hint = ", an IPv6 address in brackets" if text.count(":") > 1 else ""
            raise ValueError(f"{text!r} is not HOST:PORT{hint}")
        port = int(match["port"])
        if not 1 <= port <= 65535:
            raise ValueError(f"{port} is not a port from 1 to 65535")
        return Address(match["six"] or match["host"], port)

    def describe(self) -> str:
        return '"HOST:PORT"; HOST is a name, an IPv4 address, or an IPv6 address in brackets'


@frozen
class ListOf:
    """A list of words."""

    what: str

    def read(self, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise ValueError(f"{show(value)} is not a list of {self.what}")
        return tuple(Word(f"one of the {self.what}").read(element) for element in value)

    def describe(self) -> str:
        return f"list of {self.what}"


@frozen
class TextTable:
    """A table of text by text."""

    what: str

    def read(self, value: Any) -> Mapping[str, str]:
        if not isinstance(value, dict):
            raise ValueError(f"{show(value)} is not a table of {self.what}")
        return {name: _text(text, f"text, as {name!r} needs") for name, text in value.items()}

    def describe(self) -> str:
        return f"table of {self.what}"


@frozen
class Key(Generic[T_co]):
    """What a field of a configuration class knows about itself."""

    kind: Kind[T_co]
    doc: str
    default: str
    """As the reference shows it."""


def key(kind: Kind[T_co], default: Any, doc: str, *, shown: str | None = None) -> T_co:
    """Make a field of a configuration class.

    Args:
        kind: of its value.
        default: as one would write it in TOML, None for "not set", or a function that makes it.
        doc: what it means, for the reference.
        shown: what the reference shows as default, when not `default` itself.
    """
    if callable(default):
        field: T_co = attrs.field(factory=default, metadata={"key": Key(kind, doc, shown or "")})
        return field
    text = shown or ("not set" if default is None else f"`{_toml(default)}`")
    read = None if default is None else kind.read(default)
    field = attrs.field(default=read, metadata={"key": Key(kind, doc, text)})
    return field


def _text(value: Any, wanted: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{show(value)} is not {wanted}")
    return value


def show(value: Any) -> str:
    """Write a value of a TOML file for a message, cut short where it is long."""
    shown = _toml(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return str(value)
