"""The documents say what the code does: made parts are current, links resolve, words and numbers are right.

python -m tests.unit.test_docs      writes docs/configuration.md and the diagram in docs/protocol.md anew
"""

from __future__ import annotations

import argparse
import importlib
import re
import struct
from pathlib import Path
from typing import Any

import attrs
import pytest

from curling_fd.ctl.exit_codes import MEANINGS
from curling_fd.ctl.parser import make_parser
from curling_fd.failover.states import Event, State, diagram, role
from curling_fd.journald.messages import FIELDS
from curling_fd.link import frames
from curling_fd.service.config import reference
from curling_fd.system.privileges import NEEDED, PASSED_ON
from curling_fd.units import parse_duration

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
CONFIGURATION = DOCS / "configuration.md"
PROTOCOL = DOCS / "protocol.md"
CATALOG = ROOT / "systemd" / "curling.catalog"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")))

_DIAGRAM = re.compile(r"(?<=```mermaid\n)stateDiagram-v2\n.*?(?=\n```)", re.DOTALL)
_CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def page_names() -> list[str]:
    return [str(page.relative_to(ROOT)) for page in PAGES]


def table(*head: str) -> re.Pattern[str]:
    """Matches a table that begins with the columns `head`; its second group is its rows."""
    begins = re.escape("| " + " | ".join(head) + " |")
    return re.compile(rf"^({begins}.*\n\|[- |]*\n)((?:\|.*\n)*)", re.MULTILINE)


def rows(page: Path, *head: str) -> list[list[str]]:
    """The cells of the table in `page` that begins with the columns `head`."""
    found = table(*head).search(page.read_text("utf-8"))
    assert found, f"{page.name} has no table with the columns {head}"
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found[2].splitlines()]


def words_in(cells: list[str]) -> set[str]:
    return {word for cell in cells for word in re.findall(r"`([a-z-]+)`", cell)}


# What is made from the code.


def test_the_state_diagram_is_what_the_code_prints() -> None:
    found = _DIAGRAM.search(PROTOCOL.read_text("utf-8"))
    assert found
    assert found[0] == diagram(), "run: python -m tests.unit.test_docs"


def test_the_reference_of_the_configuration_is_current() -> None:
    assert CONFIGURATION.read_text("utf-8") == reference(), "run: python -m tests.unit.test_docs"


# Links and commands.


def anchors(page: Path) -> set[str]:
    """The ids that headings get, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", _CODE_BLOCK.sub("", page.read_text("utf-8")), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("name", page_names())
def test_every_relative_link_resolves(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", _CODE_BLOCK.sub("", page.read_text("utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


@pytest.mark.parametrize("name", page_names())
def test_every_file_of_the_project_that_is_named_exists(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    roots = r"(?:curling_fd|tests|systemd|bench)"
    for path in re.findall(rf"(?<![\w/.-]){roots}/[\w./-]*[\w/]", text):
        assert (ROOT / path).exists(), path
    rooms = {path.name for path in (ROOT / "curling_fd").iterdir() if path.is_dir()}
    for path in re.findall(r"`([a-z]+/[a-z_]+\.py)`", text):
        assert path.split("/")[0] not in rooms or (ROOT / "curling_fd" / path).exists(), path


def commands() -> dict[str, argparse.ArgumentParser]:
    (choices,) = [
        action.choices for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction)
    ]
    return dict(choices)


@pytest.mark.parametrize("name", page_names())
def test_every_command_of_curlingctl_that_is_named_exists(name: str) -> None:
    known = commands()
    for line in re.findall(r"\bcurlingctl ([a-z][^`\n]*)", _prose_joined((ROOT / name).read_text("utf-8"))):
        word, _, rest = line.partition(" ")
        assert word in known, f"curlingctl {word}"
        options = {option for action in known[word]._actions for option in action.option_strings}
        for option in re.findall(r"--[a-z-]+", re.split(r"\s{2,}|&&|;|#|->", rest)[0]):
            assert option in options, f"curlingctl {word} {option}"


def _prose_joined(text: str) -> str:
    """Only what is code, so that "curlingctl" in a sentence is not taken for a command."""
    blocks = _CODE_BLOCK.findall(text)
    spans = re.findall(r"`([^`\n]+)`", _CODE_BLOCK.sub("", text))
    return "\n".join([*blocks, *spans])


# Words and numbers.


def test_operations_tells_every_state_with_its_role() -> None:
    told = {row[0].strip("`"): row[1] for row in rows(DOCS / "operations.md", "state")}
    assert told == {state.value: role(state) for state in State}


def test_operations_tells_every_event() -> None:
    told = words_in([row[0] for row in rows(DOCS / "operations.md", "event")])
    source = "".join(path.read_text("utf-8") for path in (ROOT / "curling_fd/service").glob("*.py"))
    calls = re.findall(r"\.note\(([^,]+),", source)
    noted = {word for call in calls for word in re.findall(r'"([a-z-]+)"', call)}
    assert told == {event.value for event in Event} | noted


def exit_codes() -> list[list[str]]:
    return [[str(int(code)), meaning] for code, meaning in MEANINGS.items()]


def capabilities() -> list[list[str]]:
    passed_on = [[f"`{name}`", f"{why} (passed on)"] for name, why in PASSED_ON.items()]
    return [[f"`{name}`", why] for name, why in NEEDED.items()] + passed_on


def journal_fields() -> list[list[str]]:
    return [[f"`{field.name}`", field.meaning] for field in FIELDS.values()]


def journal_messages() -> list[list[str]]:
    """Ids and subjects of the message catalog; test_catalog.py holds that to the code."""
    found = re.findall(r"^-- ([0-9a-f]{32})\nSubject: (.*)$", CATALOG.read_text("utf-8"), re.MULTILINE)
    return [[f"`{id}`", subject.replace("@CURLING_VM@", "VM")] for id, subject in found]


def test_operations_tells_every_field_and_every_message_of_the_journal() -> None:
    for head, cells in (("field", journal_fields()), ("MESSAGE_ID", journal_messages())):
        assert rows(DOCS / "operations.md", head) == cells, "run: python -m tests.unit.test_docs"


def test_operations_tells_every_exit_code() -> None:
    assert rows(DOCS / "operations.md", "code") == exit_codes(), "run: python -m tests.unit.test_docs"


def test_security_tells_every_capability() -> None:
    assert rows(DOCS / "security.md", "capability") == capabilities(), "run: python -m tests.unit.test_docs"


def test_protocol_tells_every_kind_of_frame() -> None:
    told = {(int(row[0]), row[1]) for row in rows(PROTOCOL, "no.", "kind")}
    assert told == {(int(kind), kind.name) for kind in frames.Kind}


def test_protocol_tells_the_layout_of_a_frame() -> None:
    payload = b'{"a":1}'
    frame = frames.encode_json(frames.Kind.NOTE, 3, 5, {"a": 1})
    sizes = {row[2]: row[:2] for row in rows(PROTOCOL, "offset")}

    def field(name: str) -> bytes:
        offset, size = (
            sum(len(payload) if part == "L" else int(part) for part in cell.split("+"))
            for cell in sizes[name]
        )
        return frame[offset : offset + size]

    def number(name: str) -> int:
        return int.from_bytes(field(name), "big")

    assert (field('`"CRLG"`'), field('`"CMIT"`'), field("payload")) == (b"CRLG", b"CMIT", payload)
    assert (number("kind"), number("generation of the VM"), number("sequence")) == (frames.Kind.NOTE, 3, 5)
    assert (number("length L of the payload"), number("sequence again")) == (len(payload), 5)
    assert field("XXH3-128 of header and payload") == frames.digest(frame[: frames.HEADER_SIZE], payload)
    assert len(frame) == 52 + len(payload) + 16


def test_protocol_tells_the_head_of_a_checkpoint() -> None:
    head = frames.CheckpointHead(ram=1, device=2, disk=3, boundary_us=4).encode()
    told = [(int(row[0]), int(row[1])) for row in rows(PROTOCOL, "offset", "size", "part")[:4]]
    assert [struct.unpack_from(">Q", head, offset)[0] for offset, _ in told] == [1, 2, 3, 4]
    assert sum(size for _, size in told) == frames.HEAD_SIZE == len(head)


def test_architecture_tells_the_time_budgets_of_the_code() -> None:
    for name, value, _ in rows(DOCS / "architecture.md", "constant"):
        told = [parse_duration(part) for part in value.split(" to ")]
        found = constant(name.strip("`"))
        assert told == (list(found) if isinstance(found, tuple) else [found]), name


def constant(name: str) -> Any:
    """A constant of a module, or the default of a key of the configuration."""
    place, _, last = name.rpartition(".")
    try:
        return getattr(importlib.import_module(place), last)
    except ModuleNotFoundError:
        module, _, kind = place.rpartition(".")
        return getattr(attrs.fields(getattr(importlib.import_module(module), kind)), last).default


def test_no_page_names_a_target_of_make_that_is_not_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"\bmake ([a-z]+)\b", _prose_joined(page.read_text("utf-8")))
        assert set(named) <= targets, page.name


def main() -> None:
    """Write what is made from the code."""
    CONFIGURATION.write_text(reference(), "utf-8")
    PROTOCOL.write_text(_DIAGRAM.sub(lambda _: diagram(), PROTOCOL.read_text("utf-8")), "utf-8")
    for page, head, cells in (
        (DOCS / "operations.md", "code", exit_codes()),
        (DOCS / "operations.md", "field", journal_fields()),
        (DOCS / "operations.md", "MESSAGE_ID", journal_messages()),
        (DOCS / "security.md", "capability", capabilities()),
    ):
        text = page.read_text("utf-8")
        old = table(head).search(text)
        assert old, page.name
        made = "".join(f"| {' | '.join(row)} |\n" for row in cells)
        page.write_text(text[: old.start(2)] + made + text[old.end(2) :], "utf-8")


if __name__ == "__main__":
    main()
