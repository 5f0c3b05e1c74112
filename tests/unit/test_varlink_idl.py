"""The interface language, and the control interface written in it."""

from __future__ import annotations

from typing import Any

import pytest

from curling_fd import errors
from curling_fd.service.interface import control_interface
from curling_fd.varlink import idl
from curling_fd.varlink.idl import Mismatch

LAMPS = """
# Lamps.
interface org.example.lamps

type Lamp (
  name: string,
  # Between 0 and 1.
  level: ?float,
  mode: (steady, blinking),
  place: ?(x: int, y: int)
)
method Add(lamps: []Lamp, names: [string]string, note: ?object) -> (count: int)
method List() -> ()
error NoSuchLamp (name: string)
"""


def test_a_description_is_parsed_into_types_methods_and_errors() -> None:
    interface = idl.parse(LAMPS)
    assert interface.name == "org.example.lamps"
    assert interface.text == LAMPS
    assert list(interface.types) == ["Lamp"]
    assert list(interface.methods) == ["Add", "List"]
    assert list(interface.errors["NoSuchLamp"].fields) == ["name"]
    assert interface.types["Lamp"].fields["mode"].values == ("steady", "blinking")
    assert interface.types["Lamp"].fields["level"].nullable


LAMP = {"name": "a", "mode": "steady"}


@pytest.mark.parametrize(
    "parameters",
    [
        {"lamps": [], "names": {}},
        {"lamps": [LAMP], "names": {"a": "b"}, "note": {"any": [1]}},
        {"lamps": [{**LAMP, "level": 1, "place": {"x": 1, "y": 2}}], "names": {}, "note": None},
    ],
)
def test_values_that_fit_pass(parameters: dict[str, Any]) -> None:
    interface = idl.parse(LAMPS)
    interface.check(interface.methods["Add"].takes, parameters)


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"names": {}}, "lamps"),
        ({"lamps": None, "names": {}}, "lamps"),
        ({"lamps": {}, "names": {}}, "lamps"),
        ({"lamps": [], "names": []}, "names"),
        ({"lamps": [], "names": {"k": 1}}, "names.k"),
        ({"lamps": [], "names": {}, "extra": 1}, "extra"),
        ({"lamps": [], "names": {}, "note": "text"}, "note"),
        ({"lamps": [LAMP, {"name": 1, "mode": "steady"}], "names": {}}, "lamps.1.name"),
        ({"lamps": [{**LAMP, "mode": "off"}], "names": {}}, "lamps.0.mode"),
        ({"lamps": [{**LAMP, "mode": ["steady"]}], "names": {}}, "lamps.0.mode"),
        ({"lamps": [{**LAMP, "level": True}], "names": {}}, "lamps.0.level"),
        ({"lamps": [{**LAMP, "place": {"x": 1.5, "y": 2}}], "names": {}}, "lamps.0.place.x"),
        ({"lamps": [{**LAMP, "place": {"x": True, "y": 2}}], "names": {}}, "lamps.0.place.x"),
    ],
)
def test_the_parameter_that_does_not_fit_is_named(parameters: dict[str, Any], named: str) -> None:
    interface = idl.parse(LAMPS)
    with pytest.raises(Mismatch) as caught:
        interface.check(interface.methods["Add"].takes, parameters)
    assert caught.value.parameter == named


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "unexpected end"),
        ("interface", "unexpected end"),
        ("face a.b", "line 1: 'face' where 'interface' is due"),
        ("interface a.b\nthing X ()", "line 2: 'thing'"),
        ("interface a.b\nmethod X() (a: int)", "'->' is due"),
        ("interface a.b\ntype X (a: number)", "'number' is not a type"),
        ("interface a.b\ntype X (a: Y)", "type Y is not defined"),
        ("interface a.b\ntype X (a: int, b)", "mixture"),
        ("interface a.b\ntype X (a: int b: int)", "',' is due"),
        ("interface a.b\ntype X (a: int)\nerror X ()", "line 3: X is defined twice"),
        ("interface a.b\n\n!", "line 3: unexpected '!'"),
    ],
)
def test_what_does_not_follow_the_grammar_is_refused_with_its_line(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        idl.parse(text)


def test_the_control_interface_has_an_error_for_every_class_of_exception_and_no_other() -> None:
    classes = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.CurlingError)
    }
    assert set(control_interface().errors) == classes | {"InternalError"}
    for kind in control_interface().errors.values():
        assert list(kind.fields) == ["text", "remedy", "facts"]


def test_the_control_interface_has_the_methods_of_the_admin_tool() -> None:
    verbs = "List Show Protect Unprotect Failover Switch Pause Resume Tune Watch Events Doctor"
    assert list(control_interface().methods) == verbs.split()


def test_the_description_keeps_to_what_systemd_parses() -> None:
    # Its parser takes a comment before a field but not after the last one of a struct, and no trailing comma.
    text = control_interface().text
    for line in text.splitlines():
        assert "#" not in line.partition("#")[0]
        assert line.lstrip().startswith("#") or "#" not in line
    stripped = "".join(line for line in text.splitlines() if not line.lstrip().startswith("#")).replace(
        " ", ""
    )
    assert ",)" not in stripped
