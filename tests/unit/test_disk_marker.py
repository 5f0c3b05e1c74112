"""What is remembered of a copy, and when it is in doubt."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from curling_fd.disk.marker import Marker, decode, encode
from curling_fd.disk.markers import MarkerStore, stamp
from curling_fd.errors import ConfigError

numbers = st.integers(0, 1 << 62)
markers = st.builds(Marker, numbers, st.text(), numbers, numbers, st.text())
VALID = Marker(4096, "basis", 3, 17, "stamp")


@given(st.dictionaries(st.text(), markers))
def test_what_was_remembered_comes_back(remembered: dict[str, Marker]) -> None:
    assert decode(encode(remembered)) == remembered


@given(st.text() | st.recursive(st.none() | st.booleans() | st.integers(), st.lists).map(json.dumps))
def test_anything_else_is_refused(text: str) -> None:
    try:
        decode(text)
    except ValueError:
        return
    assert json.loads(text) == {}


@pytest.mark.parametrize(
    "wrong",
    [{"size": True}, {"size": -1}, {"size": "1"}, {"basis": None}, {"more": 1}, {"sequence": 1 << 64}],
)
def test_a_marker_with_something_wrong_in_it_counts_for_nothing(wrong: dict[str, object]) -> None:
    entry = json.loads(encode({"disk": VALID}))["disk"] | wrong
    with pytest.raises(ValueError, match=r"no marker|is"):
        decode(json.dumps({"disk": entry}))


def test_a_copy_is_in_doubt_while_it_is_written_and_when_it_looks_otherwise() -> None:
    assert VALID.valid
    assert VALID.basis_for(4096, "stamp") == "basis"
    assert not VALID.basis_for(8192, "stamp")
    assert not VALID.basis_for(4096, "another")
    assert not evolve(VALID, stamp="").basis_for(4096, "")
    writing = VALID.invalidated()
    assert not writing.valid and not writing.basis_for(4096, "stamp") and not writing.basis_for(4096, "")
    assert (writing.generation, writing.sequence) == (3, 17)


def test_markers_are_kept_for_each_vm(tmp_path: Path) -> None:
    store = MarkerStore(tmp_path)
    assert store.load("one") == {}
    store.save("one", {"disk": VALID})
    store.save("two", {})
    assert MarkerStore(tmp_path).load("one") == {"disk": VALID}
    assert store.load("two") == {}
    (tmp_path / "disks/one.json").write_text(encode({"disk": VALID})[:-1])
    assert store.load("one") == {}, "what is damaged is in doubt"


def test_a_marker_that_cannot_be_kept_is_said(tmp_path: Path) -> None:
    (tmp_path / "disks").write_text("")
    with pytest.raises(ConfigError):
        MarkerStore(tmp_path).save("one", {})


def test_a_file_looks_otherwise_once_somebody_wrote_to_it(tmp_path: Path) -> None:
    path = tmp_path / "copy"
    assert stamp(path) == ""
    path.write_bytes(bytes(4096))
    os.utime(path, ns=(1, 1))
    before = stamp(path)
    assert before == stamp(path)
    with open(path, "r+b") as file:
        file.write(b"x")
    assert stamp(path) not in ("", before)


def test_a_device_looks_otherwise_once_somebody_wrote_to_it(tmp_path: Path) -> None:
    file = tmp_path / "device"
    file.write_bytes(bytes(1 << 20))
    made = subprocess.run(["losetup", "-f", "--show", file], check=True, stdout=subprocess.PIPE, text=True)
    path = made.stdout.strip()
    try:
        before = stamp(path)
        assert before == stamp(path)
        with open(path, "r+b") as device:
            device.write(b"x" * 4096)
            device.flush()
            os.fsync(device.fileno())
        assert stamp(path) not in ("", before)
    finally:
        subprocess.run(["losetup", "-d", path], check=True)
