"""Every error has words of its own, and they carry its facts."""

from __future__ import annotations

import attrs
import pytest

from curling_fd import errors
from curling_fd.sentences import INTERNAL_ERROR, Sentence, has_words, sentence
from curling_fd.varlink.failures import error_facts, error_from, error_name, error_reply
from curling_fd.varlink.protocol import ErrorReply, Reply

CLASSES = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.CurlingError)
]


def test_every_fact_is_of_a_type_that_crosses_the_control_socket() -> None:
    types = {str(field.type) for kind in CLASSES if attrs.has(kind) for field in attrs.fields(kind)}
    assert types <= {"str", "str | None", "int", "float", "tuple[str, ...]"}


def example(kind: type[errors.CurlingError]) -> errors.CurlingError:
    """An error of that class whose text facts are all different words."""
    facts: dict[str, object] = {}
    for field in attrs.fields(kind) if attrs.has(kind) else ():
        annotation = str(field.type)
        if "tuple" in annotation:
            facts[field.name] = (f"{field.name}-one", f"{field.name}-two")
        elif "str" in annotation:
            facts[field.name] = "Do as the peer says." if field.name == "remedy" else f"the-{field.name}"
        else:
            facts[field.name] = 7
    return kind(**facts)


def is_well_formed(said: Sentence) -> bool:
    return all(
        part[0].isupper() or part[0] in "/'" or part.startswith(("the-", "name-"))
        for part in (said.text, said.remedy)
    ) and all(
        part.endswith((".", "?")) and "\n" not in part and "None" not in part
        for part in (said.text, said.remedy)
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_has_a_sentence_of_its_own(kind: type[errors.CurlingError]) -> None:
    assert kind is errors.CurlingError or has_words(kind)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_sentence_is_one_line_and_says_what_to_do(kind: type[errors.CurlingError]) -> None:
    error = example(kind)
    said = sentence(error)
    assert is_well_formed(said), said
    assert str(error) == said.text


@pytest.mark.parametrize("kind", CLASSES)
def test_the_facts_are_in_the_words(kind: type[errors.CurlingError]) -> None:
    error = example(kind)
    said = sentence(error)
    for value in errors.facts(error).values():
        for word in value if isinstance(value, tuple) else (value,):
            assert str(word) in said.text + said.remedy


@pytest.mark.parametrize("kind", CLASSES)
def test_optional_facts_may_be_absent(kind: type[errors.CurlingError]) -> None:
    facts = errors.facts(example(kind))
    for field in attrs.fields(kind) if attrs.has(kind) else ():
        if field.default is not attrs.NOTHING:
            facts[field.name] = field.default
    assert is_well_formed(sentence(kind(**facts)))


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_comes_back_from_its_reply_as_it_was(kind: type[errors.CurlingError]) -> None:
    error = example(kind)
    back = error_from(error_reply(error))
    assert type(back) is kind
    assert errors.facts(back) == errors.facts(error)
    assert sentence(back) == sentence(error)


def test_foreign_words_with_stops_and_newlines_fit_into_a_sentence() -> None:
    error = errors.QmpCommandFailed("migrate", "GenericError", "State blocked\n by 'ivshmem'.")
    assert sentence(error).text == "QEMU refused migrate: State blocked by 'ivshmem' (GenericError)."


def test_the_last_lines_the_standby_printed_are_in_the_text() -> None:
    error = errors.StandbyFailed("it exited with status 1", "one\ntwo\nqemu: warning.\n\nqemu: no x.img\n\n")
    assert sentence(error).text.endswith(
        "it exited with status 1; it printed: two / qemu: warning / qemu: no x.img."
    )


@pytest.mark.parametrize(
    ("error", "text", "remedy"),
    [
        (
            errors.WrongRole("db1", "failover", "primary"),
            "this host is primary for db1",
            "on the VM's backup",
        ),
        (errors.WrongRole("db1", "protect", "none"), "this host has no role for db1", "where the VM runs"),
        (
            errors.WrongRole("db1", "being its backup", "primary"),
            "does not go with being its backup",
            "on both hosts",
        ),
    ],
)
def test_the_wrong_host_is_told_which_is_the_right_one(
    error: errors.WrongRole, text: str, remedy: str
) -> None:
    assert text in sentence(error).text
    assert remedy in sentence(error).remedy


def test_the_remedy_for_a_writable_disk_names_the_keys() -> None:
    remedy = sentence(errors.WritableDisk(("disk0",))).remedy
    assert "take it out of shared_disks" in remedy
    assert "scratch_disks" in remedy
    assert "make it read-only" in remedy


@pytest.mark.parametrize(("ours", "theirs", "who"), [(1, 2, "this host"), (2, 1, "the other host")])
def test_the_older_side_is_the_one_to_upgrade(ours: int, theirs: int, who: str) -> None:
    assert who in sentence(errors.PeerIncompatible(ours, theirs)).remedy


def test_an_error_of_a_newer_service_speaks_for_itself() -> None:
    parameters = {"text": "The moon\n is full.", "remedy": "Wait.", "facts": {"phase": 4}}
    error = error_from(Reply(parameters, error="io.curling.Control.FullMoon"))
    assert isinstance(error, ErrorReply)
    assert sentence(error) == Sentence("The moon is full.", "Wait.")
    assert error_name(error) == "FullMoon"
    assert error_facts(error) == {"phase": 4}


@pytest.mark.parametrize(
    "facts",
    [
        {"name": "a"},
        {"name": "a", "matches": 3},
        {"name": "a", "matches": "b"},
        {"name": None, "matches": []},
        {"name": "a", "matches": ["b"], "more": 1},
        [],
        None,
    ],
)
def test_a_known_error_with_facts_that_do_not_fit_keeps_the_words_it_came_with(facts: object) -> None:
    reply = Reply(
        {"text": "Words.", "remedy": "More words.", "facts": facts}, error="io.curling.Control.AmbiguousVm"
    )
    error = error_from(reply)
    assert isinstance(error, ErrorReply)
    assert sentence(error) == Sentence("Words.", "More words.")


@pytest.mark.parametrize(
    ("name", "parameters", "text"),
    [
        ("org.varlink.service.MethodNotFound", {"method": "a.b.C"}, "This curlingd has no method a.b.C."),
        ("org.varlink.service.InvalidParameter", {"parameter": "nmae"}, "does not take the parameter nmae"),
        ("org.varlink.service.ExpectedMore", {}, "only as a stream"),
        ("com.example.Odd", {}, "the error com.example.Odd"),
    ],
)
def test_errors_of_varlink_itself_are_told_in_words(name: str, parameters: dict[str, str], text: str) -> None:
    said = sentence(ErrorReply(name, parameters))
    assert text in said.text
    assert is_well_formed(said)


def test_a_bare_base_class_says_what_it_was_given() -> None:
    assert str(errors.CurlingError("disk on fire")) == "Curling failed: disk on fire."
    assert str(errors.CurlingError()) == "Curling failed."


def test_facts_become_json_whatever_they_are() -> None:
    error = errors.PeerUnreachable("a:1", OSError("no"))  # type: ignore[arg-type]
    assert error_facts(error) == {"address": "a:1", "problem": "no"}
    assert error_facts(errors.PrimaryAlive("a", float("inf"))) == {"name": "a", "silent_ms": "inf"}


def test_the_words_for_an_unexpected_error_point_at_the_journal() -> None:
    assert "journal" in INTERNAL_ERROR.remedy
