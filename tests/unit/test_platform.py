"""What a host has: KVM, devices, modules, a clock; and what doctor says of it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from curling_fd.service.config import Address, DaemonConfig
from curling_fd.service.hostcheck import Check, check_host, clock_problem
from curling_fd.system.platform import hardware_clock, kvm_problem, missing_modules

DAY = 86400.0
NOW = 1_800_000_000.0


def cpu(folder: Path, flags: str) -> Path:
    path = folder / "cpuinfo"
    path.write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse2\nbugs\t\t: none\n")
    return path


# KVM.


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("vmx", "though the CPU could: kvm_intel is not loaded"),
        ("svm", "though the CPU could: kvm_amd is not loaded"),
        ("svmx", "and the CPU shows no virtualization"),
    ],
)
def test_a_host_without_kvm_is_told_what_it_lacks(tmp_path: Path, flags: str, said: str) -> None:
    device = tmp_path / "kvm"
    assert kvm_problem(device, cpu(tmp_path, flags)) == f"there is no {device}, {said}"


def test_a_device_that_is_not_kvms_is_found_out(tmp_path: Path) -> None:
    assert kvm_problem(Path("/dev/null")) == "/dev/null is not KVM's: Inappropriate ioctl for device"
    assert kvm_problem(tmp_path) == f"{tmp_path} cannot be opened: Is a directory"


# Modules.


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """The root of a host whose kernel has ifb built in, sch_plug to load, and act_mirred loaded."""
    folder = tmp_path / "lib/modules/6.12"
    folder.mkdir(parents=True)
    (folder / "modules.builtin").write_text("kernel/drivers/net/ifb.ko\nkernel/net/sched/cls_x-y.ko\n")
    (folder / "modules.dep").write_text(
        "kernel/net/sched/sch_plug.ko.xz: kernel/net/a.ko.xz\nkernel/net/a.ko.xz:\nkernel/net/xsch_b.ko:\n"
    )
    (tmp_path / "sys/module/act_mirred").mkdir(parents=True)
    return tmp_path


def test_modules_are_built_in_loaded_or_to_be_had(kernel: Path) -> None:
    assert missing_modules(("ifb", "sch_plug", "act-mirred", "cls_x_y"), "6.12", kernel) == ()
    assert missing_modules(("sch_b", "ifb", "nothing"), "6.12", kernel) == ("sch_b", "nothing")


def test_nobody_knows_what_a_kernel_has_whose_modules_are_not_here(kernel: Path) -> None:
    assert missing_modules(("sch_plug",), "5.0", kernel) is None
    assert missing_modules(("act_mirred",), "5.0", kernel) == ()


# Clocks.


def test_a_hardware_clock_is_read_if_there_is_one(tmp_path: Path) -> None:
    clock = tmp_path / "since_epoch"
    assert hardware_clock(clock) is None
    clock.write_text("1800000000\n")
    assert hardware_clock(clock) == NOW
    clock.write_text("garbage\n")
    assert hardware_clock(clock) is None


@pytest.mark.parametrize(
    ("newest", "hardware", "said"),
    [
        (NOW - 5, None, None),
        (NOW + DAY / 2, int(NOW + DAY / 2), None),
        (
            NOW + 400 * DAY,
            None,
            "the clock says 2027-01-15 08:00 UTC, but files here were written on 2028-02-19",
        ),
        (0, int(NOW - 400 * DAY), "the clock says 2027-01-15 08:00 UTC, the battery-backed one 2025-12-11"),
    ],
)
def test_a_clock_that_cannot_be_right_is_found_out(
    newest: float, hardware: int | None, said: str | None
) -> None:
    problem = clock_problem(NOW, newest, hardware)
    assert problem is None if said is None else problem is not None and problem.startswith(said)


# What doctor says.


def config(folder: Path, **settings: object) -> DaemonConfig:
    state, run = folder / "state", folder / "run"
    state.mkdir(exist_ok=True)
    run.mkdir(exist_ok=True)
    keys = {
        "state_directory": str(state),
        "runtime_directory": str(run),
        "listen": Address("192.0.2.1", 9271),
    }
    return DaemonConfig(host_name="alpha", **(keys | settings))  # type: ignore[arg-type]


def finding(name: str, found: list[Check]) -> Check:
    (check,) = [check for check in found if check.check == name]
    return check


def test_everything_that_is_not_right_has_a_remedy(tmp_path: Path) -> None:
    found = check_host(config(tmp_path))
    names = ["kvm", "kernel modules", "state directory", "runtime directory", "clock", "link"]
    assert [check.check for check in found] == names
    assert all(bool(check.remedy) == (check.status != "ok") for check in found)
    assert all(check.vm is None for check in found)


@pytest.mark.parametrize("name", ["state", "runtime"])
@pytest.mark.parametrize(
    ("room", "said"),
    [
        ({"f_bavail": 255, "f_frsize": 4096}, "is full: 1020 KiB and 1000 inodes are free"),
        ({"f_favail": 3}, "is full: 3.81 GiB and 3 inodes are free"),
        ({"f_flag": os.ST_RDONLY}, "cannot be written"),
    ],
)
def test_a_directory_without_room_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, room: dict[str, int], said: str
) -> None:
    class Room:
        f_bavail, f_frsize, f_files, f_favail, f_flag = 1_000_000, 4096, 2000, 1000, 0

    settings = config(tmp_path)
    directory = {"state": settings.state_directory, "runtime": settings.runtime_directory}[name]
    for field, value in room.items():
        monkeypatch.setattr(Room, field, value)
    monkeypatch.setattr(os, "statvfs", lambda path: Room() if path == directory else os.fstatvfs(0))
    check = finding(f"{name} directory", check_host(settings))
    assert (check.status, check.message) == ("failed", f"{directory} {said}")
    assert check.remedy


def test_a_file_system_without_a_number_of_inodes_is_not_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Room:
        f_bavail, f_frsize, f_files, f_favail, f_flag = 1_000_000, 4096, 0, 0, 0

    monkeypatch.setattr(os, "statvfs", lambda path: Room())
    assert finding("runtime directory", check_host(config(tmp_path))).status == "ok"


def test_a_directory_that_is_gone_is_named(tmp_path: Path) -> None:
    settings = config(tmp_path)
    (tmp_path / "run").rmdir()
    check = finding("runtime directory", check_host(settings))
    assert check.status == "failed"
    assert check.message == f"{tmp_path}/run cannot be looked at: No such file or directory"
    assert "`runtime_directory`" in check.remedy


def test_a_clock_behind_what_was_written_before_is_named(tmp_path: Path) -> None:
    settings = config(tmp_path)
    state = tmp_path / "state/db1.json"
    state.write_text("{}")
    later = time.time() + 400 * DAY
    os.utime(state, (later, later))
    check = finding("clock", check_host(settings))
    assert check.status == "warning"
    assert "but files here were written on" in check.message
    assert "timedatectl" in check.remedy
