"""QEMU's two forms of option properties."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from curling_fd.standby.keyval import JsonProperties, Keyval, escape, parse_properties

keys = st.text("abcdefghijklmxyz-._0123456789", min_size=1, max_size=8)
values = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def test_a_doubled_comma_is_part_of_the_value() -> None:
    assert Keyval.parse("a=1,,2,b=,,").items == (("a", "1,2"), ("b", ","))


def test_the_first_item_may_leave_out_its_key() -> None:
    properties = Keyval.parse("socket,id=c", "backend")
    assert properties.get("backend") == "socket"
    assert properties.render() == "socket,id=c"


def test_an_implied_value_may_hold_doubled_commas_and_then_an_equals_sign() -> None:
    assert Keyval.parse("a,,b=c,d=e", "path").items == ((None, "a,b=c"), ("d", "e"))


def test_flags_are_on_and_off_as_qemu_reads_them() -> None:
    properties = Keyval.parse("/run/x,server,nowait", "path")
    assert (properties.get("server"), properties.get("wait")) == ("on", "off")


def test_the_last_of_two_values_counts() -> None:
    assert Keyval.parse("a=1,a=2").get("a") == "2"
    assert Keyval.parse("a=1,b=3,a=2").set("a", "9").render() == "a=9,b=3"


def test_set_keeps_the_place_and_adds_at_the_end() -> None:
    properties = Keyval.parse("pc,accel=kvm", "type").set("type", "q35").set("usb", True)
    assert properties.render() == "q35,accel=kvm,usb=on"


def test_drop_takes_the_implied_key_too() -> None:
    assert Keyval.parse("pc,accel=kvm", "type").drop("type").render() == "accel=kvm"


def test_a_new_implied_value_with_an_equals_sign_gets_its_key_back() -> None:
    properties = Keyval.parse("/run/a,server=on", "path").set("path", "/run/b=c")
    assert properties.render() == "path=/run/b=c,server=on"
    assert Keyval.parse(properties.render(), "path").get("path") == "/run/b=c"


@given(st.lists(st.tuples(keys, values), max_size=6), values)
def test_what_is_rendered_is_parsed_back(pairs: list[tuple[str, str]], first: str) -> None:
    plain = Keyval(tuple(pairs))
    assert Keyval.parse(plain.render()).items == plain.items
    implied = Keyval(((None, first), ("k", "v"), *pairs), "type")
    again = Keyval.parse(implied.render(), "type")
    assert again.get("type") == dict(pairs).get("type", first)
    assert list(again.walk()) == list(implied.walk())


@given(st.text(max_size=30), st.sampled_from([None, "type"]))
@example("a=b,", None)
@example(",,,", "type")
def test_parsing_never_fails_and_settles_after_one_round(text: str, implied: str | None) -> None:
    once = Keyval.parse(text, implied)
    assert list(Keyval.parse(once.render(), implied).walk()) == list(once.walk()) or not once.render()


@given(values)
def test_an_escaped_value_stands_for_itself(value: str) -> None:
    assert Keyval.parse(f"a={escape(value)},b=1").get("a") == value


def test_json_is_taken_where_the_argument_begins_with_a_brace() -> None:
    properties = parse_properties('{"driver":"file","cache":{"direct":true},"l":[{"a":1}]}', "driver")
    assert isinstance(properties, JsonProperties)
    assert list(properties.walk()) == [("driver", "file"), ("cache.direct", "on"), ("l.0.a", "1")]


def test_json_keeps_types_and_changes_only_strings() -> None:
    properties = JsonProperties.parse('{"a":1,"b":true,"c":"x","d":{"e":["x",null]}}')
    assert properties.map(lambda key, text: text + key).render() == (
        '{"a":1,"b":true,"c":"xc","d":{"e":["xd.e.0",null]}}'
    )


def test_a_dotted_key_of_json_is_set_in_its_object() -> None:
    properties = JsonProperties.parse('{"type":"stream","addr":{"type":"unix","path":"/a"}}')
    assert properties.set("addr.path", "/b").render() == (
        '{"type":"stream","addr":{"type":"unix","path":"/b"}}'
    )
    assert properties.set("new.deep", 1).get("new.deep") == "1"


@pytest.mark.parametrize("text", ["{", "{'driver':'file'}", "{} x"])
def test_what_is_not_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - JSONDecodeError's words are the library's
        parse_properties(text)
