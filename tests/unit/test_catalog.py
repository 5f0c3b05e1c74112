"""The message catalog explains every kind of entry, in the form that journalctl takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from attrs import frozen

from curling_fd.journald.messages import FIELDS, Message
from tests.unit.test_docs import ROOT, anchors

CATALOG = ROOT / "systemd/curling.catalog"
DOCUMENTS = "file:///usr/local/share/doc/curling/"


@frozen
class Explanation:
    """An entry of the catalog."""

    id: str
    headers: list[tuple[str, str]]
    text: str

    def header(self, name: str) -> str:
        (value,) = [value for found, value in self.headers if found == name]
        return value


def explanations() -> list[Explanation]:
    """Read the catalog by the rules of https://systemd.io/CATALOG/, as strict as they allow."""
    text = re.sub(r"^#.*\n", "", CATALOG.read_text("utf-8"), flags=re.MULTILINE)
    before, *entries = re.split(r"^-- (?=[0-9a-f]{32}$)", text, flags=re.MULTILINE)
    assert before.strip() == ""
    found = []
    for entry in entries:
        head, _, body = entry.partition("\n\n")
        id, *lines = head.splitlines()
        headers = [re.fullmatch(r"([A-Z][A-Za-z-]+): (.+)", line) for line in lines]
        assert all(headers), head
        found.append(Explanation(id, [(match[1], match[2]) for match in headers if match], body.strip()))
    return found


EXPLANATIONS = {Message(entry.id): entry for entry in explanations()}
"""Fails when the catalog has an id that the daemon does not know."""


def test_every_kind_of_entry_is_explained_once() -> None:
    assert [Message(entry.id) for entry in explanations()] == list(Message)


@pytest.mark.parametrize("message", Message, ids=lambda message: message.name)
def test_an_explanation_is_whole(message: Message) -> None:
    entry = EXPLANATIONS[message]
    assert [name for name, _ in entry.headers] == ["Subject", "Defined-By", "Support", "Documentation"]
    assert entry.header("Defined-By") == "curling"
    # What happened; what it means for the guest; what to do.
    assert len(entry.text.split("\n\n")) == 3
    assert re.search(r"\bguests?\b|\bruns nowhere\b", entry.text)
    assert max(map(len, entry.text.splitlines())) <= 80 + len("@CURLING_@")


@pytest.mark.parametrize("message", Message, ids=lambda message: message.name)
def test_an_explanation_names_only_fields_that_its_entries_have(message: Message) -> None:
    entry = EXPLANATIONS[message]
    named = set(re.findall(r"@(\w+)@", entry.header("Subject") + entry.text))
    always = {"vm", "peer", "state", "generation"} if message is not Message.CANNOT_START else set()
    if message is Message.TAKEN_OVER:
        always.add("failover_ms")
    assert named <= {FIELDS[name].name for name in always}
    assert ("CURLING_VM" in named) == (message is not Message.CANNOT_START)


@pytest.mark.parametrize("message", Message, ids=lambda message: message.name)
def test_an_explanation_points_to_documents_that_exist(message: Message) -> None:
    for header in ("Support", "Documentation"):
        uri = EXPLANATIONS[message].header(header)
        assert uri.startswith(DOCUMENTS)
        path, _, anchor = uri.removeprefix(DOCUMENTS).partition("#")
        page = ROOT / path
        assert page.exists()
        assert not anchor or anchor in anchors(page), uri


def test_the_readme_installs_catalog_and_documents_where_they_are_looked_for() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert "systemd/curling.catalog /usr/local/lib/systemd/catalog/curling.catalog" in readme
    assert "journalctl --update-catalog" in readme
    folder = Path(DOCUMENTS.removeprefix("file://"))
    assert f"install -Dm644 -t {folder} README.md\n" in readme
    assert f"install -Dm644 -t {folder}/docs docs/*.md\n" in readme
