"""Errors as they cross the control socket: `io.curling.Control.<Class>` with {text, remedy, facts}. No
I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curling_fd import errors
from curling_fd.errors import CurlingError
from curling_fd.sentences import INTERNAL_ERROR, Sentence, sentence
from curling_fd.varlink.protocol import ErrorReply, Reply, split_method

CONTROL = "io.curling.Control"

_CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, CurlingError)
}


def error_name(error: CurlingError) -> str:
    """The one word for an error's kind: its class, or what another service called it."""
    return split_method(error.name)[1] if isinstance(error, ErrorReply) else type(error).__name__


def error_facts(error: CurlingError) -> dict[str, Any]:
    """The facts of `error` as JSON has them."""
    if isinstance(error, ErrorReply):
        facts = error.parameters.get("facts", error.parameters)
    else:
        facts = errors.facts(error)
    return {name: _plain(value) for name, value in facts.items()} if isinstance(facts, Mapping) else {}


def error_reply(error: CurlingError) -> Reply:
    """Make the reply that carries `error`."""
    return _reply(error_name(error), sentence(error), error_facts(error))


def internal_error_reply() -> Reply:
    """Make the reply for an exception that is none of ours; it says nothing of the cause."""
    return _reply("InternalError", INTERNAL_ERROR, {})


def error_from(reply: Reply) -> CurlingError:
    """Make the exception that an error reply stands for.

    It is the class of `curling_fd.errors` the daemon raised, with its facts, or an `ErrorReply` when this
    version has no such class or the class has other facts.
    """
    assert reply.error is not None
    interface, name = split_method(reply.error)
    unknown = ErrorReply(reply.error, reply.parameters)
    facts = reply.parameters.get("facts")
    if interface != CONTROL or name not in _CLASSES or not isinstance(facts, Mapping):
        return unknown
    fields = {field.name: str(field.type) for field in getattr(_CLASSES[name], "__attrs_attrs__", ())}
    if set(facts) != set(fields) or not all(_fits(facts[key], kind) for key, kind in fields.items()):
        return unknown
    return _CLASSES[name](
        **{key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
    )


def _fits(value: Any, kind: str) -> bool:
    """Whether a JSON value can be a fact whose annotation is `kind`."""
    if value is None:
        return "None" in kind
    if isinstance(value, list):
        return kind == "tuple[str, ...]" and all(isinstance(element, str) for element in value)
    if isinstance(value, str):
        return kind.startswith("str")
    return isinstance(value, int | float) and kind in ("int", "float")


def _reply(name: str, words: Sentence, facts: Mapping[str, Any]) -> Reply:
    return Reply({"text": words.text, "remedy": words.remedy, "facts": facts}, error=f"{CONTROL}.{name}")


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(element) for element in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(element) for key, element in value.items()}
    return str(value)
