"""Arbiters: exactly one winner for each generation, and no right for anybody without an answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import trio
import trio.testing

from curling_fd.errors import ArbiterLost, ArbiterUnavailable
from curling_fd.failover.arbiter import FILE_TIMEOUT, FileArbiter, ManualArbiter

VM = "web"


async def outcome(arbiter: FileArbiter, current: int) -> int | str:
    """The generation that was won, or who has it."""
    try:
        return await arbiter.swap(VM, current, incumbent=False)
    except ArbiterLost as error:
        return error.winner


def claims(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def test_the_first_claim_wins_and_the_loser_learns_who_did(tmp_path: Path) -> None:
    alpha, beta = FileArbiter(tmp_path, "alpha"), FileArbiter(tmp_path, "beta")
    assert await alpha.generation(VM) == 0
    assert await alpha.swap(VM, 0, incumbent=True) == 1
    with pytest.raises(ArbiterLost) as caught:
        await beta.swap(VM, 0, incumbent=False)
    assert (caught.value.generation, caught.value.winner) == (1, "alpha")
    assert await beta.generation(VM) == 1
    assert await beta.swap(VM, 1, incumbent=False) == 2
    assert await alpha.generation(VM) == 2


@pytest.mark.parametrize("current", [0, 1, 3, 4])
async def test_whoever_does_not_know_the_newest_generation_loses(tmp_path: Path, current: int) -> None:
    alpha, beta = FileArbiter(tmp_path, "alpha"), FileArbiter(tmp_path, "beta")
    for generation in range(5):
        await alpha.swap(VM, generation, incumbent=True)
    assert await outcome(beta, current) == "alpha"
    assert await beta.generation(VM) == 5


async def test_the_incumbent_has_no_better_claim_than_the_other(tmp_path: Path) -> None:
    alpha, beta = FileArbiter(tmp_path, "alpha"), FileArbiter(tmp_path, "beta")
    await beta.swap(VM, 0, incumbent=False)
    with pytest.raises(ArbiterLost):
        await alpha.swap(VM, 0, incumbent=True)


async def test_a_claim_whose_answer_was_lost_is_made_again(tmp_path: Path) -> None:
    alpha, beta = FileArbiter(tmp_path, "alpha"), FileArbiter(tmp_path, "beta")
    for _ in range(3):
        assert await alpha.swap(VM, 6, incumbent=False) == 7
    assert await outcome(beta, 6) == "alpha"
    assert await beta.swap(VM, 7, incumbent=False) == 8
    assert await outcome(alpha, 6) == "beta", "but not once it has been taken over"


async def test_of_many_that_claim_at_once_in_threads_one_wins(tmp_path: Path) -> None:
    for generation in range(5):
        outcomes: list[int | str] = []

        async def claim(host: str, current: int, into: list[int | str]) -> None:
            into.append(await outcome(FileArbiter(tmp_path, host), current))

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(claim, f"host-{number}", generation, outcomes)
        won = [result for result in outcomes if isinstance(result, int)]
        losers = {result for result in outcomes if isinstance(result, str)}
        assert won == [generation + 1]
        assert len(losers) == 1, "and all others are told the same name"


_CLAIMER = """
import sys, trio
from curling_fd.errors import ArbiterLost
from curling_fd.failover.arbiter import FileArbiter

async def main(directory, host):
    arbiter = FileArbiter(directory, host)
    for line in sys.stdin:
        try:
            print(await arbiter.swap("web", int(line), incumbent=False), flush=True)
        except ArbiterLost as error:
            print(error.winner, flush=True)

trio.run(main, sys.argv[1], sys.argv[2])
"""


def test_of_many_processes_that_claim_at_once_one_wins(tmp_path: Path) -> None:
    hosts = [f"host-{number}" for number in range(4)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _CLAIMER, str(tmp_path), host],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        for host in hosts
    ]
    winners: Counter[str] = Counter()
    for current in range(25):
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(f"{current}\n")
        answers = [process.stdout.readline().strip() for process in processes if process.stdout]
        (winner,) = [host for host, answer in zip(hosts, answers, strict=True) if answer == str(current + 1)]
        assert answers.count(winner) == 3, "all others are told who won"
        winners[winner] += 1
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert winners.total() == 25


async def test_whoever_has_been_overtaken_by_the_time_it_looks_has_lost(tmp_path: Path) -> None:
    """It won generation 1, and somebody who knew it has won generation 2."""
    overtaken = FileArbiter(tmp_path, "alpha")
    highest, beta = overtaken._highest, FileArbiter(tmp_path, "beta")
    looks = 0

    def look(vm: str) -> int:
        nonlocal looks
        looks += 1
        if looks == 2:
            beta._claim(VM, 2)
        return highest(vm)

    overtaken._highest = look  # type: ignore[method-assign]
    with pytest.raises(ArbiterLost) as caught:
        await overtaken.swap(VM, 0, incumbent=True)
    assert (caught.value.generation, caught.value.winner) == (2, "beta")


class Sleeper(FileArbiter):
    """One that was frozen between its look at the directory and its claim, while others went on."""

    def __init__(self, directory: Path, others: int) -> None:
        super().__init__(directory, "sleeper")
        self._others = others

    def _highest(self, vm: str) -> int:
        found, others = super()._highest(vm), self._others
        self._others = 0
        beta = FileArbiter(self._directory, "beta")
        for number in range(others):
            beta._claim(vm, found + number + 1)
        return found


@pytest.mark.parametrize("others", [1, 2, 9, 30])
async def test_a_host_that_slept_through_generations_does_not_win_an_old_one(
    tmp_path: Path, others: int
) -> None:
    await FileArbiter(tmp_path, "alpha").swap(VM, 3, incumbent=True)
    with pytest.raises(ArbiterLost) as caught:
        await Sleeper(tmp_path, others).swap(VM, 4, incumbent=False)
    assert caught.value.winner == "beta"
    assert await FileArbiter(tmp_path, "alpha").generation(VM) == 4 + others


async def test_old_claims_and_drafts_are_not_left_behind(tmp_path: Path) -> None:
    alpha, beta = FileArbiter(tmp_path, "alpha"), FileArbiter(tmp_path, "beta")
    for generation in range(40):
        await alpha.swap(VM, generation, incumbent=True)
        assert await outcome(beta, generation) == "alpha"
    assert claims(tmp_path) == ["web.generation.39", "web.generation.40"]


async def test_a_claim_says_who_made_it_and_when(tmp_path: Path) -> None:
    await FileArbiter(tmp_path, "alpha").swap(VM, 0, incumbent=True)
    claim = json.loads((tmp_path / "web.generation.1").read_text())
    assert claim["host"] == "alpha"
    assert claim["time"] > 1_600_000_000


async def test_vms_do_not_touch_each_other(tmp_path: Path) -> None:
    arbiter = FileArbiter(tmp_path, "alpha")
    for vm, current in (("web", 4), ("web2", 9), ("w.b", 6), ("web.generation.8", 2), ("we", 1)):
        await arbiter.swap(vm, current, incumbent=True)
    for vm, generation in (("web", 5), ("web2", 10), ("w.b", 7), ("web.generation.8", 3), ("we", 2)):
        assert await arbiter.generation(vm) == generation
    assert await arbiter.generation("w") == 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 7}', "\xff"])
async def test_a_claim_that_cannot_be_read_still_counts(tmp_path: Path, content: str) -> None:
    (tmp_path / "web.generation.3").write_text(content, "latin-1")
    arbiter = FileArbiter(tmp_path, "alpha")
    assert await arbiter.generation(VM) == 3
    with pytest.raises(ArbiterLost) as caught:
        await arbiter.swap(VM, 2, incumbent=True)
    assert caught.value.winner in ("another host", "7")
    assert await arbiter.swap(VM, 3, incumbent=True) == 4


# No answer


def read_only_directory() -> Path:
    """One that root cannot write to either."""
    return Path("/sys/kernel")


@pytest.mark.parametrize("which", ["missing", "a file", "read-only"])
async def test_a_directory_that_is_of_no_use_gives_no_right(tmp_path: Path, which: str) -> None:
    (tmp_path / "file").touch()
    directory = {"missing": tmp_path / "no", "a file": tmp_path / "file", "read-only": read_only_directory()}
    arbiter = FileArbiter(directory[which], "alpha")
    with pytest.raises(ArbiterUnavailable) as caught:
        await arbiter.swap(VM, 0, incumbent=True)
    assert str(directory[which]) in caught.value.why
    with pytest.raises(ArbiterUnavailable):
        await arbiter.leave_token(VM)
    if which != "read-only":
        with pytest.raises(ArbiterUnavailable):
            await arbiter.generation(VM)


class Hung(FileArbiter):
    """Storage that does not answer until `answers` is set."""

    def __init__(self, directory: Path, host: str) -> None:
        super().__init__(directory, host)
        self.answers = threading.Event()

    def _highest(self, vm: str) -> int:
        self.answers.wait()
        return super()._highest(vm)


async def test_storage_that_hangs_gives_no_right_and_does_not_hang_us(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    arbiter = Hung(tmp_path, "alpha")
    started = trio.current_time()
    try:
        with pytest.raises(ArbiterUnavailable, match="did not answer in 5 s"):
            await arbiter.swap(VM, 0, incumbent=True)
        assert trio.current_time() - started == pytest.approx(FILE_TIMEOUT, abs=0.1)
    finally:
        arbiter.answers.set()


async def test_a_claim_that_was_given_up_and_made_after_all_is_won_when_asked_for_again(
    tmp_path: Path,
) -> None:
    arbiter = Hung(tmp_path, "alpha")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outcome, arbiter, 0)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    arbiter.answers.set()
    with trio.fail_after(20):
        while not (tmp_path / "web.generation.1").exists():
            await trio.lowlevel.checkpoint()
    assert await arbiter.swap(VM, 0, incumbent=True) == 1
    assert await outcome(FileArbiter(tmp_path, "beta"), 0) == "alpha"


# The proof that both see the same directory


async def test_a_token_is_seen_by_a_host_with_the_same_directory_only(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    alpha, beta = FileArbiter(tmp_path, "alpha"), FileArbiter(tmp_path, "beta")
    token = await alpha.leave_token(VM)
    assert await beta.sees_token(token)
    assert not await FileArbiter(tmp_path / "other", "beta").sees_token(token)
    assert await alpha.generation(VM) == 0, "a token is no claim"
    await alpha.remove_token(token)
    assert not await beta.sees_token(token)
    await alpha.remove_token(token)
    assert claims(tmp_path) == ["other"]


@pytest.mark.parametrize("token", ["", ".", "..", "/etc/passwd", "../../etc/passwd", "web.generation.1"])
async def test_what_is_no_token_proves_nothing(tmp_path: Path, token: str) -> None:
    arbiter = FileArbiter(tmp_path, "alpha")
    await arbiter.swap(VM, 0, incumbent=True)
    (tmp_path / "passwd").touch()
    assert not await arbiter.sees_token(token)


async def test_two_tokens_are_never_the_same(tmp_path: Path) -> None:
    arbiter = FileArbiter(tmp_path, "alpha")
    assert len({await arbiter.leave_token(VM) for _ in range(20)}) == 20


# `manual`


async def test_with_manual_the_incumbent_goes_on_and_nobody_else_may() -> None:
    arbiter = ManualArbiter()
    assert not arbiter.automatic
    assert FileArbiter.automatic
    assert await arbiter.swap(VM, 5, incumbent=True) == 5
    with pytest.raises(ArbiterUnavailable, match="operator"):
        await arbiter.swap(VM, 5, incumbent=False)
    assert await arbiter.generation(VM) == 0


def test_the_directory_used_for_the_read_only_case_is_there() -> None:
    assert read_only_directory().is_dir()
    with pytest.raises(OSError, match=r"."):
        os.close(os.open(read_only_directory() / "curling-test", os.O_CREAT | os.O_WRONLY))
