"""The two ways QEMU writes an option's properties: `key=value,key=value` and a JSON object.

Sources: qemu `util/keyval.c` and `util/qemu-option.c`. A comma inside a value is doubled; the first item
may leave out its key; a later item without `=` is a flag, `x` for `x=on` and `nox` for `x=off`. JSON is
taken where the argument begins with `{`, as QEMU does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from attrs import evolve, frozen


def escape(value: str) -> str:
    """Double the commas of `value`, as it must stand in a `key=value` list."""
    return value.replace(",", ",,")


def text_of(value: Any) -> str:
    """A JSON scalar as the text `key=value` would hold."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


@frozen
class Keyval:
    """Properties in the `key=value` form; an item whose key is None is the first one, its key left out."""

    items: tuple[tuple[str | None, str], ...]
    implied: str | None = None

    @classmethod
    def parse(cls, text: str, implied: str | None = None) -> Keyval:
        """Parse `text`; `implied` is the key a first item without `=` stands for. Never fails."""
        items: list[tuple[str | None, str]] = []
        rest = text
        while rest:
            mark = next((i for i, c in enumerate(rest) if c in "=,"), len(rest))
            if mark < len(rest) and rest[mark] == "=":
                value, rest = _take_value(rest[mark + 1 :], rest[:mark])
                items.append(value)
            elif implied is not None and not items:
                (_, first), rest = _take_value(rest, "")
                items.append((None, first))
            else:
                flag, rest = rest[:mark], rest[mark + 1 :]
                items.append((flag[2:], "off") if flag.startswith("no") else (flag, "on"))
        return cls(tuple(items), implied)

    def get(self, key: str) -> str | None:
        """The last value given for `key`, or None."""
        for name, value in reversed(self.items):
            if self._key(name) == key:
                return value
        return None

    def set(self, key: str, value: Any) -> Keyval:
        """With `key` having `value`, at its old place if it had one."""
        done, items = False, []
        for name, old in self.items:
            if self._key(name) == key:
                if not done:
                    items.append((name, text_of(value)))
                done = True
            else:
                items.append((name, old))
        if not done:
            items.append((key, text_of(value)))
        return evolve(self, items=tuple(items))

    def drop(self, *keys: str) -> Keyval:
        """Without `keys`."""
        return evolve(self, items=tuple(i for i in self.items if self._key(i[0]) not in keys))

    def names(self) -> list[str]:
        """The keys as `drop` takes them."""
        return [self._key(name) for name, _ in self.items]

    def walk(self) -> Iterator[tuple[str, str]]:
        """Every dotted key with its value as text."""
        for name, value in self.items:
            yield self._key(name), value

    def map(self, change: Callable[[str, str], str]) -> Keyval:
        """With each value replaced by `change(key, value)`."""
        items = tuple((name, change(self._key(name), value)) for name, value in self.items)
        return evolve(self, items=items)

    def render(self) -> str:
        """The argument text; the first item keeps its key left out if it had."""
        return ",".join(self._item(name, value) for name, value in self.items)

    def _item(self, name: str | None, value: str) -> str:
        if name is None and "=" not in value.partition(",")[0]:
            return escape(value)
        return f"{self._key(name)}={escape(value)}"

    def _key(self, name: str | None) -> str:
        return (self.implied or "") if name is None else name


@frozen
class JsonProperties:
    """Properties in the JSON form. Keys of nested objects are joined by dots, as `key=value` writes them."""

    tree: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> JsonProperties:
        """Parse `text`.

        Raises:
            ValueError: it is not a JSON object.
        """
        tree = json.loads(text)
        if not isinstance(tree, dict):
            raise ValueError("not a JSON object")
        return cls(tree)

    def get(self, key: str) -> str | None:
        """The value of the dotted `key` as text, or None; objects and lists have no text."""
        return dict(self.walk()).get(key)

    def set(self, key: str, value: Any) -> JsonProperties:
        """With the dotted `key` having `value`, a JSON value; objects on the way are made."""
        return JsonProperties(_set(self.tree, key.split("."), value))

    def drop(self, *keys: str) -> JsonProperties:
        """Without `keys` (of the top level)."""
        return JsonProperties({k: v for k, v in self.tree.items() if k not in keys})

    def names(self) -> list[str]:
        """The keys of the top level, as `drop` takes them."""
        return list(self.tree)

    def walk(self) -> Iterator[tuple[str, str]]:
        """Every dotted key that has a scalar, with it as text; list items are numbered."""
        yield from _walk(self.tree, "")

    def map(self, change: Callable[[str, str], str]) -> JsonProperties:
        """With each string replaced by `change(key, string)`; numbers and booleans are left."""
        return JsonProperties(_map(self.tree, "", change))

    def render(self) -> str:
        """The argument text, compact."""
        return json.dumps(self.tree, separators=(",", ":"), ensure_ascii=False)


Properties = Keyval | JsonProperties


def parse_properties(text: str, implied: str | None = None) -> Properties:
    """Parse an option's argument in whichever form it has.

    Raises:
        ValueError: it begins with `{` and is not JSON.
    """
    return JsonProperties.parse(text) if text.startswith("{") else Keyval.parse(text, implied)


def _take_value(text: str, key: str) -> tuple[tuple[str, str], str]:
    """Split `text` behind its first single comma: ((key, value unescaped), rest)."""
    parts: list[str] = []
    while True:
        head, comma, text = text.partition(",")
        parts.append(head)
        if not comma or not text.startswith(","):
            return (key, ",".join(parts)), text
        text = text[1:]


def _walk(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _walk(value, f"{path}.{key}" if path else key)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _walk(value, f"{path}.{index}")
    elif node is not None:
        yield path, text_of(node)


def _map(node: Any, path: str, change: Callable[[str, str], str]) -> Any:
    if isinstance(node, dict):
        return {k: _map(v, f"{path}.{k}" if path else k, change) for k, v in node.items()}
    if isinstance(node, list):
        return [_map(v, f"{path}.{i}", change) for i, v in enumerate(node)]
    return change(path, node) if isinstance(node, str) else node


def _set(node: Any, path: list[str], value: Any) -> dict[str, Any]:
    tree = dict(node) if isinstance(node, dict) else {}
    tree[path[0]] = value if len(path) == 1 else _set(tree.get(path[0]), path[1:], value)
    return tree
