"""The files for systemd, as systemd's own tools read them."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from curling_fd.system import privileges

UNITS = Path(__file__).resolve().parents[2] / "systemd"


def settings(name: str, key: str) -> list[str]:
    """Every value of `key` in a unit, in order."""
    return re.findall(rf"^{key}=(.*)$", (UNITS / name).read_text(), re.MULTILINE)


def tool(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True)


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """Copies whose program is one that is installed here."""
    for unit in UNITS.glob("curlingd.*"):
        shutil.copy(unit, tmp_path)
    service = tmp_path / "curlingd.service"
    service.write_text(service.read_text().replace("ExecStart=/usr/bin/curlingd", "ExecStart=/usr/bin/true"))
    return tmp_path


def test_systemd_finds_nothing_wrong_with_the_units(units: Path) -> None:
    done = tool("systemd-analyze", "verify", str(units / "curlingd.socket"), str(units / "curlingd.service"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_systemd_would_find_something_wrong(units: Path) -> None:
    service = units / "curlingd.service"
    service.write_text(service.read_text().replace("KillMode=", "KilMode="))
    assert "KilMode" in tool("systemd-analyze", "verify", str(service)).stderr


def test_the_program_is_where_a_package_puts_it() -> None:
    assert settings("curlingd.service", "ExecStart") == ["/usr/bin/curlingd"]


def test_the_capabilities_are_the_ones_curlingd_keeps_without_systemd() -> None:
    bounding = " ".join(settings("curlingd.service", "CapabilityBoundingSet")).split()
    assert sorted(bounding) == sorted([*privileges.NEEDED, *privileges.PASSED_ON])


def test_a_stop_or_a_crash_of_the_daemon_leaves_vms_and_guards_alone() -> None:
    assert settings("curlingd.service", "KillMode") == ["process"]
    assert settings("curlingd.service", "OOMPolicy") == ["continue"]
    assert settings("curlingd.service", "RuntimeDirectory") == []
    assert settings("curlingd.service", "Restart") == ["always"]


def test_a_dump_of_the_daemon_does_not_hold_guests_memory() -> None:
    assert settings("curlingd.service", "LimitCORE") == ["0"]


def test_the_socket_has_the_name_the_daemon_asks_for() -> None:
    assert settings("curlingd.socket", "FileDescriptorName") == ["control"]
    assert settings("curlingd.socket", "ListenStream") == ["/run/curling/control.sock"]
    assert settings("curlingd.socket", "SocketMode") == ["0660"]


def test_the_group_of_the_socket_is_the_one_sysusers_makes(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    done = tool("systemd-sysusers", f"--root={tmp_path}", str(UNITS / "curling.sysusers.conf"))
    assert done.returncode == 0, done.stderr
    groups = {line.partition(":")[0] for line in (tmp_path / "etc/group").read_text().splitlines()}
    assert groups == set(settings("curlingd.socket", "SocketGroup"))


def test_tmpfiles_makes_the_folders_with_their_modes(tmp_path: Path) -> None:
    conf = UNITS / "curling.tmpfiles.conf"
    done = tool("systemd-tmpfiles", f"--root={tmp_path}", "--create", str(conf))
    assert done.returncode == 0, done.stderr
    modes = {
        name: stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("run/curling", "var/lib/curling")
    }
    assert modes == {"run/curling": 0o755, "var/lib/curling": 0o700}
    # The age field is empty: nothing here is ever cleaned.
    lines = [line.split() for line in conf.read_text().splitlines() if line and not line.startswith("#")]
    assert [line[5] for line in lines] == ["-", "-"]


def test_state_has_one_mode_wherever_it_is_said() -> None:
    assert settings("curlingd.service", "StateDirectory") == ["curling"]
    assert settings("curlingd.service", "StateDirectoryMode") == ["0700"]
