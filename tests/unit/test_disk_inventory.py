"""Which disks are replicated, from what QEMU tells of its drives."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curling_fd.disk.inventory import Disk, aliases, decode, replicated
from curling_fd.errors import DiskUnfit, FrameError, WritableDisk

GIB = 1 << 30


def drive(name: str = "drive0", **changes: Any) -> dict[str, Any]:
    """A drive as `query-block` of QEMU 11.1 tells it, as far as it is looked at."""
    inserted = {
        "ro": False,
        "drv": "raw",
        "file": "/srv/disk.img",
        "node-name": "#block123",
        "encrypted": False,
        "image": {"virtual-size": GIB, "format": "raw", "filename": "/srv/disk.img"},
        **changes,
    }
    qdev = "/machine/peripheral/disk0/virtio-backend"
    return {"device": name, "qdev": qdev, "removable": False, "inserted": inserted}


def found(*drives: dict[str, Any], **settings: Any) -> tuple[Disk, ...]:
    return replicated(
        drives, settings.get("jobs", ()), settings.get("shared", ()), settings.get("scratch", ())
    )


def test_every_disk_that_the_guest_can_write_is_replicated() -> None:
    empty = {"device": "cd0", "removable": True}
    assert found(drive(), drive("cd1", ro=True), empty) == (
        Disk("drive0", GIB, "raw", "/srv/disk.img", "#block123"),
    )


@pytest.mark.parametrize("name", ["drive0", "disk0", "#block123"])
def test_a_scratch_disk_is_left_alone_by_whatever_name(name: str) -> None:
    assert found(drive(), scratch=[name]) == ()


@pytest.mark.parametrize("name", ["drive0", "disk0", "#block123"])
def test_a_shared_disk_that_can_be_written_is_refused(name: str) -> None:
    with pytest.raises(WritableDisk) as caught:
        found(drive(), shared=[name])
    assert caught.value.devices == ("drive0",)
    assert found(drive(ro=True), shared=[name]) == ()


def test_a_disk_is_called_as_somebody_has_called_it() -> None:
    assert found(drive(""))[0].name == "disk0"
    nameless = {**drive(""), "qdev": None}
    nameless["inserted"]["node-name"] = "libvirt-1-format"
    assert found(nameless)[0].name == "libvirt-1-format"
    assert aliases(nameless) == {"libvirt-1-format"}


@pytest.mark.parametrize(
    ("filename", "path"),
    [
        ("/srv/disk.img", "/srv/disk.img"),
        ("/dev/vg0/db1", "/dev/vg0/db1"),
        (
            "json:" + json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": "/srv/a b"}}),
            "/srv/a b",
        ),
        ('json:{"driver": "raw", "file": {"driver": "host_device", "filename": "/dev/sdb"}}', "/dev/sdb"),
    ],
)
def test_the_file_behind_a_disk_is_found(filename: str, path: str) -> None:
    assert found(drive(file=filename))[0].path == path


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"drv": "vmdk"}, "its format is vmdk"),
        ({"drv": "qcow2", "encrypted": True}, "QEMU encrypts it"),
        ({"file": "disk.img"}, "absolute path"),
        ({"file": "nbd://host/x"}, "absolute path"),
        ({"file": 'json:{"driver": "raw", "file": {"driver": "rbd", "pool": "p"}}'}, "absolute path"),
        ({"file": "json:{"}, "absolute path"),
        ({"image": {"virtual-size": 1000}}, "no multiple of 512"),
    ],
)
def test_a_disk_that_cannot_be_replicated_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(DiskUnfit) as caught:
        found(drive(**changes))
    assert caught.value.disk == "drive0"
    assert problem in str(caught.value)
    assert found(drive(**changes), scratch=["drive0"]) == ()


def test_a_job_of_somebody_elses_is_refused_where_there_is_a_disk() -> None:
    job = {"device": "backup0", "type": "mirror"}
    with pytest.raises(DiskUnfit, match="mirror, called backup0"):
        found(drive(), jobs=[job])
    assert found(drive(ro=True), jobs=[job]) == ()


def test_disks_are_read_as_they_were_written() -> None:
    disks = (Disk("a", 512, "raw", "/a"), Disk("b", 1 << 40, "qcow2", "/b"))
    assert decode(json.loads(json.dumps([disk.encode() for disk in disks]))) == disks


_VALUES = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text(), max_size=2)


@given(
    st.lists(
        st.dictionaries(st.sampled_from(["name", "size", "format", "path", "x"]), _VALUES) | _VALUES,
        max_size=3,
    )
    | _VALUES
)
def test_whatever_a_peer_calls_disks_is_read_or_refused(content: object) -> None:
    try:
        disks = decode(content)
    except FrameError:
        return
    assert all(disk.size > 0 and disk.format in ("raw", "qcow2") for disk in disks)
