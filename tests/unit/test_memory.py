"""How much memory can be had, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from curling_fd.system.memory import available, killed_for_memory

GIB = 1 << 30


@pytest.fixture
def host(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  16777216 kB\nMemAvailable:    8388608 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/system.slice/curlingd.service\n")
    return tmp_path


def limit(host: Path, group: str, maximum: str, current: int, inactive: int = 0) -> None:
    folder = host / "cgroup" / group
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{maximum}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\nactive_file 7\n")


def measured(host: Path) -> int:
    return available(host / "proc", host / "cgroup")


def test_without_limits_it_is_what_the_host_has(host: Path) -> None:
    assert measured(host) == 8 * GIB
    limit(host, "system.slice/curlingd.service", "max", GIB)
    assert measured(host) == 8 * GIB


def test_a_limit_on_the_unit_binds(host: Path) -> None:
    limit(host, "system.slice/curlingd.service", str(4 * GIB), GIB)
    assert measured(host) == 3 * GIB


def test_a_limit_above_the_unit_binds_too(host: Path) -> None:
    limit(host, "system.slice/curlingd.service", str(6 * GIB), GIB)
    limit(host, "system.slice", str(2 * GIB), GIB)
    assert measured(host) == GIB


def test_cache_that_can_be_had_back_counts_as_free(host: Path) -> None:
    limit(host, "system.slice/curlingd.service", str(4 * GIB), 4 * GIB, inactive=GIB)
    assert measured(host) == GIB


def test_a_group_beyond_its_limit_leaves_nothing(host: Path) -> None:
    limit(host, "system.slice/curlingd.service", str(GIB), 2 * GIB)
    assert measured(host) == 0


def test_the_older_hierarchies_are_not_asked(host: Path) -> None:
    (host / "proc/self/cgroup").write_text("4:memory:/a:b\n0::/\n")
    assert measured(host) == 8 * GIB


def test_this_host_has_some() -> None:
    assert available() > 0


def test_processes_that_were_killed_for_memory_are_counted(host: Path) -> None:
    def counted() -> int:
        return killed_for_memory(host / "proc", host / "cgroup")

    assert counted() == 0
    limit(host, "system.slice/curlingd.service", "max", GIB)
    events = host / "cgroup/system.slice/curlingd.service/memory.events"
    events.write_text("low 0\nhigh 0\nmax 12\noom 2\noom_kill 3\noom_group_kill 0\n")
    assert counted() == 3
