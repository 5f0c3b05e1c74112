"""What stays in the cache of the lab."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.vm.tidy import in_use, tidy


def entries(root: Path, kind: str, ages: list[float]) -> list[Path]:
    """Folders of `kind`, made so many seconds ago."""
    made = []
    for number, age in enumerate(ages):
        entry = root / "vm" / f"{kind}-{number:012x}"
        entry.mkdir(parents=True)
        (entry / "disk.raw").write_bytes(b"disk")
        os.utime(entry, (time.time() - age,) * 2)
        made.append(entry)
    return made


def test_the_three_newest_of_each_kind_stay(tmp_path: Path) -> None:
    hosts = entries(tmp_path, "host", [5000, 1000, 4000, 2000, 3000])
    payloads = entries(tmp_path, "payload", [9000, 9000])
    assert sorted(tidy(tmp_path)) == [hosts[0], hosts[2]]
    assert sorted((tmp_path / "vm").iterdir()) == sorted([hosts[1], hosts[3], hosts[4], *payloads])


def test_what_was_made_just_now_stays(tmp_path: Path) -> None:
    entries(tmp_path, "host", [1, 2, 3, 4, 5])
    assert tidy(tmp_path) == []


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    hosts = entries(tmp_path, "host", [1000, 2000, 3000, 4000])
    with in_use(hosts[3]):
        os.utime(hosts[3], (time.time() - 4000,) * 2)
        assert tidy(tmp_path) == []
    assert tidy(tmp_path) == [hosts[3]]
