"""What a daemon remembers: whole or not at all, and never guessed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from attrs import asdict
from hypothesis import given, settings
from hypothesis import strategies as st

from curling_fd.errors import ConfigError
from curling_fd.service.store import Remembered, Store

thorough = settings(max_examples=60, deadline=None, derandomize=True)

KNOWN = Remembered(generation=7, wanted=True, qmp="/run/curling/web/qmp.sock", fenced=None)

remembered = st.builds(
    Remembered,
    generation=st.integers(0, 1 << 70),
    wanted=st.booleans(),
    qmp=st.none() | st.text(),
    fenced=st.none() | st.text(),
    elsewhere=st.booleans(),
)


def test_nothing_is_remembered_of_a_vm_that_is_new(tmp_path: Path) -> None:
    assert Store(tmp_path).load("web") == Remembered()
    assert (Remembered().generation, Remembered().wanted, Remembered().qmp) == (0, False, None)


@thorough
@given(remembered)
def test_what_is_saved_is_loaded(tmp_path_factory: pytest.TempPathFactory, what: Remembered) -> None:
    directory = tmp_path_factory.mktemp("state")
    Store(directory).save("web", what)
    assert Store(directory).load("web") == what


def test_each_vm_has_its_own(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number, name in enumerate(("web", "web2", "w.eb", "w.eb2", "web.new")):
        store.save(name, Remembered(generation=number))
    assert [store.load(name).generation for name in ("web", "web2", "w.eb", "w.eb2", "web.new")] == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_nothing_is_left_behind_but_the_file(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for generation in range(5):
        store.save("web", Remembered(generation=generation))
    assert [path.name for path in tmp_path.iterdir()] == ["web.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_daemon_that_dies_while_it_writes_remembers_what_it_did_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    store = Store(tmp_path)
    store.save("web", KNOWN)

    def dies(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, step, dies)
        with pytest.raises(KeyboardInterrupt):
            store.save("web", Remembered(generation=8))
    assert Store(tmp_path).load("web") == KNOWN
    store.save("web", Remembered(generation=9))
    assert store.load("web").generation == 9, "what the first left behind is in nobody's way"


def test_it_is_on_disk_before_save_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the file's content, then its name, then the directory."""
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(fd: int) -> None:
        steps.append("directory" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
        fsync(fd)

    def noting_replace(source: Path, target: Path) -> None:
        steps.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    Store(tmp_path).save("web", KNOWN)
    assert steps == ["file", "replace", "directory"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"7",
        b'"text"',
        b"\xff\xfe",
        b"{} trailing",
        b'{"generation": "7"}',
        b'{"generation": null}',
        b'{"generation": 7.5}',
        b'{"generation": true}',
        b'{"generation": -1}',
        b'{"wanted": 1}',
        b'{"qmp": 5}',
        b'{"fenced": ["why"]}',
        b'{"generation": 7, "of a newer version": 1}',
        b"[" * 100_000,
    ],
    ids=lambda content: content[:30].decode("latin-1"),
)
def test_a_file_that_cannot_be_understood_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "web.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Store(tmp_path).load("web")
    assert caught.value.path == str(path)
    assert "unreadable" in caught.value.problem
    assert path.read_bytes() == content


def test_a_file_of_an_older_version_that_had_less_to_remember_is_read(tmp_path: Path) -> None:
    (tmp_path / "web.json").write_text('{"generation": 3}')
    assert Store(tmp_path).load("web") == Remembered(generation=3)


def test_a_directory_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "web.json").mkdir()
    with pytest.raises(ConfigError, match="unreadable"):
        Store(tmp_path).load("web")


def test_the_file_is_for_people_too(tmp_path: Path) -> None:
    Store(tmp_path).save("web", KNOWN)
    content = json.loads((tmp_path / "web.json").read_text())
    assert content == asdict(KNOWN)
    assert (content["generation"], content["qmp"]) == (7, "/run/curling/web/qmp.sock")
