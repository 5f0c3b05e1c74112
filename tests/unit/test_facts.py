"""What hosts tell each other for doctor: read strictly, and compared."""

from __future__ import annotations

import json
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from curling_fd import __version__
from curling_fd.errors import FrameError
from curling_fd.service.compare import Here, compare_hosts, compare_vm, devices_used
from curling_fd.service.facts import Facts, decode
from curling_fd.service.hostcheck import Check

CONTENT: dict[str, Any] = {
    "host": "beta",
    "software": __version__,
    "state": "idle",
    "arbiter": "manual",
    "sees_token": None,
    "running": None,
    "binary": "/usr/bin/qemu-system-x86_64",
    "version": [10, 0, 2],
    "machine_known": True,
    "problem": None,
    "memory": 8 << 30,
    "devices": ["kvm", "tun"],
    "checks": [],
    "copies": [],
    "clock": [1000.25, 1000.75],
}
HERE = Here(
    runs=True, version=(10, 0, 13), machine="pc-i440fx-10.0", needed=4 << 30, devices=frozenset({"kvm"})
)


def facts(**changes: Any) -> Facts:
    return decode(CONTENT | changes, 1000.0, 1001.0)


# Reading.


def test_facts_are_read() -> None:
    found = facts(running=[7, 2, 22], sees_token=False)
    assert (found.host, found.version, found.running) == ("beta", (10, 0, 2), (7, 2, 22))
    assert (found.devices, found.sees_token) == (frozenset({"kvm", "tun"}), False)


@pytest.mark.parametrize(
    ("clock", "ahead", "margin"),
    [
        ([1000.25, 1000.75], 0.0, 0.25),
        ([1000.0, 1001.0], 0.0, 0.0),
        ([5000.25, 5000.75], 4000.0, 0.25),
        ([0.0, 0.5], -1000.25, 0.25),
    ],
)
def test_what_the_peer_took_to_answer_is_no_difference_of_clocks(
    clock: list[float], ahead: float, margin: float
) -> None:
    found = facts(clock=clock)
    assert (found.clock_ahead, found.clock_margin) == (ahead, margin)


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize("value", [{}, [[]], 10**30, -1, True, "x\0", "\ud800", [1, 2, 3, 4], float("nan")])
def test_a_wrong_answer_is_a_frame_error_or_a_fact(name: str, value: Any) -> None:
    try:
        found = facts(**{name: value})
    except FrameError:
        return
    assert list(compare_hosts(found)) and list(compare_vm("db1", HERE, found, "manual"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(st.dictionaries(st.sampled_from(sorted(CONTENT)), JSON))
def test_no_answer_can_make_doctor_fail(changes: dict[str, Any]) -> None:
    try:
        found = facts(**changes)
    except FrameError:
        return
    told = [*compare_hosts(found), *compare_vm("db1", HERE, found, "manual")]
    assert len(json.dumps([check.message + check.remedy for check in told])) < 200_000


def test_what_is_missing_is_named() -> None:
    with pytest.raises(FrameError, match="`memory` is missing"):
        decode({name: value for name, value in CONTENT.items() if name != "memory"}, 0, 0)


# Comparing.


def told(found: Facts, here: Here = HERE, arbiter: str = "manual") -> dict[str, tuple[str, str]]:
    """What doctor says, by check; and that what is not right has a remedy."""
    checks = [*compare_hosts(found), *compare_vm("db1", here, found, arbiter)]
    assert all(bool(check.remedy) == (check.status != "ok") for check in checks)
    return {check.check: (check.status, check.message) for check in checks}


def test_two_hosts_alike_have_nothing_wrong() -> None:
    assert told(facts()) == {
        "clocks": ("ok", "the clock of beta agrees with this host's"),
        "qemu of both": ("ok", "10.0.13 here, 10.0.2 on beta"),
    }


@pytest.mark.parametrize(
    ("seconds", "status", "said"),
    [
        (0.9, "ok", "agrees"),
        (-2.0, "warning", "2.0 seconds behind this host's: their journals cannot be read side by side"),
        (3700.0, "warning", "1 hour ahead of this host's"),
        (
            3 * 365.25 * 86400,
            "failed",
            "3 years ahead of this host's: a guest's hardware clock would jump by that",
        ),
        (-90000.0, "failed", "1 day behind this host's"),
    ],
)
def test_clocks_that_differ(seconds: float, status: str, said: str) -> None:
    found = evolve(facts(), clock_ahead=seconds, clock_margin=0.001)
    assert told(found)["clocks"][0] == status
    assert said in told(found)["clocks"][1]


def test_a_slow_answer_is_not_taken_for_another_clock() -> None:
    assert told(evolve(facts(), clock_ahead=1.8, clock_margin=1.0))["clocks"][0] == "ok"


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"version": [7, 2, 22]}, "failed", "10.0.13 here, 7.2.22 on beta: the backup's must not be older"),
        ({"version": [11, 1, 3]}, "warning", "10.0.13 here, 11.1.3 on beta: a VM can move to the newer one"),
        ({"machine_known": False}, "failed", "does not know the machine type pc-i440fx-10.0"),
        (
            {"problem": "there is no qemu-kvm on this host"},
            "failed",
            "beta: there is no qemu-kvm on this host",
        ),
        ({"version": None}, "warning", "cannot be compared yet"),
    ],
)
def test_a_qemu_that_differs_there(changes: dict[str, Any], status: str, said: str) -> None:
    assert told(facts(**changes))["qemu of both"][0] == status
    assert said in told(facts(**changes))["qemu of both"][1]


@pytest.mark.parametrize(
    ("running", "ours", "status"),
    [
        ([10, 0, 13], (7, 2, 22), "failed"),  # we are the backup, and older than what runs there
        ([10, 0, 13], (11, 1, 3), "warning"),
        ([10, 0, 13], (10, 0, 2), "ok"),
        (None, (7, 2, 22), "warning"),  # the VM may have been started with another QEMU
    ],
)
def test_the_backup_sees_it_too(running: list[int] | None, ours: tuple[int, int, int], status: str) -> None:
    here = Here(runs=False, version=ours)
    assert told(facts(running=running), here)["qemu of both"][0] == status


def test_what_the_vm_uses_must_be_there() -> None:
    here = evolve(HERE, devices=frozenset({"kvm", "vhost-net"}))
    assert told(facts(devices=["tun"]), here)["devices"] == (
        "failed",
        "the VM uses kvm, vhost-net, which beta has not",
    )
    assert "devices" not in told(facts(devices=["kvm", "vhost-net"]), here)
    assert "devices" not in told(facts(devices=[]), evolve(here, runs=False))


def test_memory_must_be_there_until_the_standby_has_it() -> None:
    little = facts(memory=1 << 30)
    assert told(little)["memory"] == ("failed", "beta has 1 GiB left, and the standby needs 4 GiB")
    assert "memory" not in told(evolve(little, state="standby"))
    assert "memory" not in told(little, evolve(HERE, runs=False))


def test_both_hosts_ask_the_same_arbiter() -> None:
    assert told(facts(arbiter="file"))["arbiter"][1] == 'beta has arbiter = "file", this host "manual"'
    unseen = facts(arbiter="file", sees_token=False)
    assert told(unseen, arbiter="file")["arbiter"][1] == (
        "beta does not see what this host writes to arbiter_directory"
    )
    assert "arbiter" not in told(facts(arbiter="file", sees_token=True), arbiter="file")


def test_a_vm_that_both_say_they_run() -> None:
    assert told(facts(state="unprotected"))["role"][0] == "failed"
    assert "role" not in told(facts(state="unprotected"), evolve(HERE, runs=False))


def test_copies_of_disks_must_fit_there() -> None:
    with_disks = evolve(HERE, disks=2)
    assert "disks" not in told(facts())
    assert told(facts(), with_disks)["disks"][0] == "ok"
    wrong = {"check": "disk data0", "status": "failed", "message": "There is none.", "remedy": "Make it."}
    found = told(facts(copies=[wrong]), with_disks)
    assert found["disk data0"] == ("failed", "There is none.")
    assert "disks" not in found


def test_what_the_other_host_finds_about_itself_is_told_here() -> None:
    checks = [
        {"check": "kvm", "status": "ok", "message": "fine", "remedy": ""},
        {"check": "runtime directory", "status": "failed", "message": "/run is full", "remedy": "free some"},
    ]
    found = list(compare_hosts(facts(checks=checks)))
    assert found[1:] == [Check("runtime directory on beta", None, "failed", "/run is full", "free some")]


def test_another_version_of_curlingd_is_told() -> None:
    assert told(facts(software="0.0.1"))["software"] == (
        "warning",
        f"curlingd is 0.0.1 on beta, {__version__} here",
    )


@pytest.mark.parametrize(
    ("argv", "accelerator", "used"),
    [
        ("qemu -m 1G", "tcg", set()),
        ("qemu -m 1G", "kvm", {"kvm"}),
        ("qemu -netdev tap,id=n0,ifname=tap0", "tcg", {"tun"}),
        ("qemu -netdev type=tap,id=n0,vhost=on", "kvm", {"kvm", "tun", "vhost-net"}),
        ("qemu -nic tap,vhost=off", "tcg", {"tun"}),
        ("qemu -netdev user,id=tap", "tcg", set()),
        ("qemu -device vhost-vsock-pci,guest-cid=3", "tcg", {"vhost-vsock"}),
    ],
)
def test_the_devices_that_a_command_line_needs(argv: str, accelerator: str, used: set[str]) -> None:
    assert devices_used(argv.split(), accelerator) == used
