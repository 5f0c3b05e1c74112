"""The Varlink interface language: parse a description, check values against it. No I/O.

    interface org.example.test
    # A comment.
    type Light (name: string, on: bool, level: ?int, mode: (steady, blinking))
    method Switch(name: string) -> (light: Light)
    error NoSuchLight (name: string)

Types are bool, int, float, string, object, an enum `(a, b)`, a struct `(a: int)`, a named type, `[]type`,
`[string]type` and, in front of any of them, `?` for "or null, or left out". Source:
https://varlink.org/Interface-Definition. Comments stand before what they are about, so that systemd's parser
takes the same files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from attrs import field, frozen

_TOKEN = re.compile(r"->|\[string\]|\[\]|[?():,]|[A-Za-z][A-Za-z0-9_.-]*")
_BLANK = re.compile(r"(?:\s+|#[^\n]*)+")


class Mismatch(ValueError):
    """A value does not fit its type; `parameter` is the dotted path of the one that does not."""

    def __init__(self, parameter: str, problem: str) -> None:
        super().__init__(f"{parameter}: {problem}")
        self.parameter = parameter
        self.problem = problem


@frozen
class Type:
    """One type. `kind` is a scalar's name, or array, map, enum, struct, named."""

    kind: str
    nullable: bool = False
    of: Type | None = None
    """What an array or map holds."""
    fields: Mapping[str, Type] = field(factory=dict)
    """Of a struct."""
    values: tuple[str, ...] = ()
    """Of an enum."""
    name: str = ""
    """Of a named type."""


@frozen
class Method:
    """The structs a method takes and gives."""

    takes: Type
    gives: Type


@frozen
class Interface:
    """A parsed description; `text` is what it was parsed from, comments and all."""

    name: str
    text: str
    types: Mapping[str, Type]
    methods: Mapping[str, Method]
    errors: Mapping[str, Type]

    def check(self, kind: Type, value: Any, where: str = "") -> None:
        """Check `value` against `kind`, one of this interface's types.

        Raises:
            Mismatch: naming the first field that is missing, unknown or of the wrong type.
        """
        if value is None:
            if not kind.nullable:
                raise Mismatch(where, "missing")
        elif kind.kind == "named":
            self.check(self.types[kind.name], value, where)
        elif kind.kind == "enum":
            if value not in kind.values:
                raise Mismatch(where, f"not one of {', '.join(kind.values)}")
        elif not _fits(kind.kind, value):
            raise Mismatch(where, f"not of type {kind.kind}")
        elif kind.kind == "struct":
            for name in value:
                if name not in kind.fields:
                    raise Mismatch(_join(where, name), "unknown")
            for name, inner in kind.fields.items():
                self.check(inner, value.get(name), _join(where, name))
        elif kind.of is not None:
            for name, element in value.items() if kind.kind == "map" else enumerate(value):
                self.check(kind.of, element, _join(where, str(name)))


def parse(text: str) -> Interface:
    """Parse an interface description.

    Raises:
        ValueError: it does not follow the grammar; the line is named.
    """
    return _Parser(text).interface()


def _fits(kind: str, value: Any) -> bool:
    # A bool is an int to Python, and to nobody else.
    if isinstance(value, bool):
        return kind == "bool"
    return {
        "int": isinstance(value, int),
        "float": isinstance(value, int | float),
        "string": isinstance(value, str),
        "object": isinstance(value, Mapping),
        "struct": isinstance(value, Mapping),
        "map": isinstance(value, Mapping),
        "array": isinstance(value, list | tuple),
    }.get(kind, False)


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = self._cut(text)
        self._line = 1
        self._wanted: list[str] = []
        self._next = next(self._tokens, "")

    def interface(self) -> Interface:
        types: dict[str, Type] = {}
        methods: dict[str, Method] = {}
        errors: dict[str, Type] = {}
        self._expect("interface")
        name = self._take()
        while self._next:
            keyword, member = self._take(), self._take()
            if member in types or member in methods or member in errors:
                raise self._error(f"{member} is defined twice")
            if keyword == "type":
                types[member] = self._struct_or_enum()
            elif keyword == "error":
                errors[member] = self._struct_or_enum()
            elif keyword == "method":
                takes = self._struct_or_enum()
                self._expect("->")
                methods[member] = Method(takes, self._struct_or_enum())
            else:
                raise self._error(f"{keyword!r} where type, method or error is due")
        for wanted in self._wanted:
            if wanted not in types:
                raise ValueError(f"type {wanted} is not defined")
        return Interface(name, self._text, types, methods, errors)

    def _type(self) -> Type:
        nullable = self._next == "?"
        if nullable:
            self._take()
        if self._next == "(":
            inner = self._struct_or_enum()
            return Type(inner.kind, nullable, fields=inner.fields, values=inner.values)
        word = self._take()
        if word in ("[]", "[string]"):
            return Type("array" if word == "[]" else "map", nullable, of=self._type())
        if word in ("bool", "int", "float", "string", "object"):
            return Type(word, nullable)
        if not word[:1].isupper():
            raise self._error(f"{word!r} is not a type")
        self._wanted.append(word)
        return Type("named", nullable, name=word)

    def _struct_or_enum(self) -> Type:
        fields: dict[str, Type] = {}
        values: list[str] = []
        self._expect("(")
        while self._next != ")":
            name = self._take()
            if self._next == ":":
                self._take()
                fields[name] = self._type()
            else:
                values.append(name)
            if self._next != ")":
                self._expect(",")
        self._expect(")")
        if fields and values:
            raise self._error("a mixture of struct and enum")
        return Type("enum", values=tuple(values)) if values else Type("struct", fields=fields)

    def _take(self) -> str:
        token, self._next = self._next, next(self._tokens, "")
        if not token:
            raise self._error("unexpected end")
        return token

    def _expect(self, token: str) -> None:
        if (found := self._take()) != token:
            raise self._error(f"{found!r} where {token!r} is due")

    def _cut(self, text: str) -> Iterator[str]:
        position = 0
        while True:
            if blank := _BLANK.match(text, position):
                position = blank.end()
            self._line = text.count("\n", 0, position) + 1
            if position == len(text):
                return
            match = _TOKEN.match(text, position)
            if match is None:
                raise self._error(f"unexpected {text[position]!r}")
            position = match.end()
            yield match[0]

    def _error(self, problem: str) -> ValueError:
        return ValueError(f"line {self._line}: {problem}")
