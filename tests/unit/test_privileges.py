"""Dropping capabilities, in processes of its own: what is dropped does not come back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import prctl
import pytest

from curling_fd.system.privileges import NEEDED, PASSED_ON, Privileges

ROOT = Path(__file__).resolve().parents[2]

STATES = """
def states():
    import re
    text = open("/proc/thread-self/status").read()
    sets = {name: int(value, 16) for name, value in re.findall(r"(Cap...|NoNewPrivs):\\s*([0-9a-f]+)", text)}
    return sets
"""


def run(code: str) -> dict[str, dict[str, int]]:
    """Run `code` in a new process; it prints one line of JSON."""
    done = subprocess.run(
        [sys.executable, "-c", STATES + code], cwd=ROOT, capture_output=True, check=True, text=True
    )
    result: dict[str, dict[str, int]] = json.loads(done.stdout)
    return result


def bits(*tables: dict[str, str]) -> int:
    return sum(1 << getattr(prctl, name) for table in tables for name in table)


AFTER = f"""
import json, os, subprocess, sys
from curling_fd.system import privileges
before = states()
privileges.drop()
child = subprocess.run(
    [sys.executable, "-c", "import json\\n" + {STATES!r} + "print(json.dumps(states()))"],
    capture_output=True, check=True,
)
print(json.dumps({{"before": before, "after": states(), "child": json.loads(child.stdout)}}))
"""


def test_what_is_needed_stays_and_the_rest_is_gone_for_children_too() -> None:
    seen = run(AFTER)
    before, after, child = seen["before"], seen["after"], seen["child"]
    assert before["CapPrm"], "this test needs capabilities to drop: run it as root"
    assert after["CapEff"] == before["CapEff"] & bits(NEEDED)
    assert after["CapPrm"] == before["CapPrm"] & bits(NEEDED, PASSED_ON)
    assert after["CapBnd"] == before["CapBnd"] & bits(NEEDED, PASSED_ON)
    assert after["CapInh"] == after["CapAmb"] == 0
    assert after["NoNewPrivs"] == 1
    # A QEMU we start as root has all of them in use.
    assert child["CapEff"] == child["CapPrm"] == after["CapPrm"]
    assert child["CapBnd"] == after["CapBnd"]


def test_a_process_without_capabilities_is_left_as_it_is() -> None:
    seen = run("import os; os.setuid(65534)\n" + AFTER)
    assert seen["before"]["CapPrm"] == 0
    assert seen["after"] == seen["before"]


def test_dropping_twice_is_dropping_once() -> None:
    code = """
import json
from curling_fd.system import privileges
first, second = privileges.drop(), privileges.drop()
print(json.dumps({"same": first.kept == second.kept, "dropped": len(second.dropped)}))
"""
    assert run(code) == {"same": True, "dropped": 0}


@pytest.mark.parametrize(
    ("privileges", "words"),
    [
        (Privileges((), ("CAP_KILL",), ()), "no capabilities: only VMs of this user are in reach"),
        (Privileges(("CAP_KILL",), (), ("CAP_X", "CAP_Y")), "kept CAP_KILL, gave up 2 others"),
        (
            Privileges(("CAP_KILL",), ("CAP_NET_RAW",), ()),
            "cannot announce a VM's addresses after a failover (CAP_NET_RAW is missing)",
        ),
    ],
)
def test_the_statement_says_what_is_missing_and_what_for(privileges: Privileges, words: str) -> None:
    assert words in str(privileges)


def test_every_capability_has_a_name_the_kernel_knows_and_one_table() -> None:
    assert not NEEDED.keys() & PASSED_ON.keys()
    assert all(hasattr(prctl, name) for name in (*NEEDED, *PASSED_ON))
