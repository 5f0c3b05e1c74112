"""The QMP client against a fake QEMU: answers, events, descriptors, and every way it can go wrong."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from curling_fd.errors import (
    QmpBusy,
    QmpCommandFailed,
    QmpDisconnected,
    QmpError,
    QmpNotQmp,
    QmpTimeout,
    QmpUnreachable,
)
from curling_fd.qmp.client import GREETING_TIMEOUT, open_qmp
from tests.unit.fake_qmp import GREETING, FakeQmp, answer_at_once

WITHOUT_OOB = {"QMP": {**GREETING["QMP"], "capabilities": []}}


async def never(server: FakeQmp, command: dict[str, Any]) -> None:
    """No answer."""


async def serve(nursery: trio.Nursery, tmp_path: Path, *args: Any, **options: Any) -> FakeQmp:
    server = FakeQmp(tmp_path / "qmp.sock", *args, **options)
    await nursery.start(server.serve)
    return server


async def test_an_event_for_the_client_before_us_may_come_before_the_greeting(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    event = {"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}
    early = "".join(json.dumps(message) + "\r\n" for message in (event, GREETING)).encode()
    server = await serve(nursery, tmp_path, greeting=early)
    async with open_qmp(server.path) as qmp:
        assert qmp.greeting.version == (11, 1, 3)


async def test_a_greeting_is_kept_and_answered_with_what_qemu_offers(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    server = await serve(nursery, tmp_path)
    async with open_qmp(server.path) as qmp:
        assert qmp.greeting.version == (11, 1, 3)
        assert qmp.pid == os.getpid(), "who listens on the socket"
        assert await qmp.execute("query-status") == "query-status"
    assert server.commands[0]["execute"] == "qmp_capabilities"
    assert server.commands[0]["arguments"] == {"enable": ["oob"]}


async def test_out_of_band_is_used_where_it_is_offered(nursery: trio.Nursery, tmp_path: Path) -> None:
    server = await serve(nursery, tmp_path)
    async with open_qmp(server.path) as qmp:
        await qmp.execute("x-colo-lost-heartbeat", out_of_band=True)
        await qmp.execute("x-colo-lost-heartbeat")
    assert [set(command) - {"id"} for command in server.commands[1:]] == [{"exec-oob"}, {"execute"}]


async def test_without_out_of_band_a_command_goes_in_order(nursery: trio.Nursery, tmp_path: Path) -> None:
    server = await serve(nursery, tmp_path, greeting=WITHOUT_OOB)
    async with open_qmp(server.path) as qmp:
        await qmp.execute("x-colo-lost-heartbeat", out_of_band=True)
    assert "arguments" not in server.commands[0]
    assert server.commands[1]["execute"] == "x-colo-lost-heartbeat"


async def test_answers_find_their_callers_in_whatever_order_they_come(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    waiting: list[dict[str, Any]] = []

    async def backwards(server: FakeQmp, command: dict[str, Any]) -> None:
        waiting.append(command)
        if len(waiting) == 10:
            for one in reversed(waiting):
                await server.returns(one, one["arguments"]["n"])

    server = await serve(nursery, tmp_path, backwards)
    found: dict[int, int] = {}
    async with open_qmp(server.path) as qmp:

        async def ask(n: int) -> None:
            found[n] = await qmp.execute("echo", {"n": n})

        async with trio.open_nursery() as asking:
            for n in range(10):
                asking.start_soon(ask, n)
    assert found == {n: n for n in range(10)}


async def test_a_refused_command_carries_qemus_words(nursery: trio.Nursery, tmp_path: Path) -> None:
    async def refuse(server: FakeQmp, command: dict[str, Any]) -> None:
        await server.say(
            {"error": {"class": "GenericError", "desc": "Migration is blocked"}, "id": command["id"]}
        )

    server = await serve(nursery, tmp_path, refuse)
    async with open_qmp(server.path) as qmp:
        with pytest.raises(QmpCommandFailed) as caught:
            await qmp.execute("migrate")
        assert (caught.value.command, caught.value.description) == ("migrate", "Migration is blocked")
        server.answer = answer_at_once
        assert await qmp.execute("query-status") == "query-status", "the monitor is as good as before"


@pytest.mark.parametrize("id", ["curling-guard", None, 99999, ["a", "list"], {"an": "object"}])
async def test_an_answer_to_a_command_of_somebody_else_is_passed_over(
    nursery: trio.Nursery, tmp_path: Path, id: Any
) -> None:
    async def with_a_stranger(server: FakeQmp, command: dict[str, Any]) -> None:
        await server.say({"return": {}, "id": id})
        await server.returns(command, "mine")

    server = await serve(nursery, tmp_path, with_a_stranger)
    async with open_qmp(server.path) as qmp:
        assert await qmp.execute("query-status") == "mine"


async def test_a_second_answer_to_the_same_command_is_passed_over(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    async def twice(server: FakeQmp, command: dict[str, Any]) -> None:
        answer = b'{"return": 1, "id": %d}\r\n' % command["id"]
        await server.say_raw(answer + answer)

    server = await serve(nursery, tmp_path, twice)
    async with open_qmp(server.path) as qmp:
        assert await qmp.execute("one") == 1
        assert await qmp.execute("two") == 1


async def test_every_listener_gets_every_event_however_slow_it_is(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    async def with_events(server: FakeQmp, command: dict[str, Any]) -> None:
        for number in range(1000):
            await server.event("TICK", n=number)
        await server.returns(command, {})

    server = await serve(nursery, tmp_path, with_events)
    async with open_qmp(server.path) as qmp:
        with qmp.events() as quick, qmp.events() as slow:
            seen: list[int] = []

            async def listen() -> None:
                async for event in quick:
                    seen.append(event.data["n"])

            async with trio.open_nursery() as listening:
                listening.start_soon(listen)
                # Nobody reads `slow`, and neither the answer nor `quick` waits for it.
                await qmp.execute("tick")
                await trio.testing.wait_all_tasks_blocked()
                listening.cancel_scope.cancel()
            assert seen == list(range(1000))
            assert [slow.receive_nowait().data["n"] for _ in range(1000)] == seen
            with pytest.raises(trio.WouldBlock):
                slow.receive_nowait()


async def test_a_listener_sees_what_comes_while_it_listens(nursery: trio.Nursery, tmp_path: Path) -> None:
    async def one_event(server: FakeQmp, command: dict[str, Any]) -> None:
        await server.event("NUMBER", n=command["arguments"]["n"])
        await server.returns(command, {})

    server = await serve(nursery, tmp_path, one_event)
    async with open_qmp(server.path) as qmp:
        await qmp.execute("number", {"n": 1})
        with qmp.events() as stream:
            await qmp.execute("number", {"n": 2})
            assert (await stream.receive()).data == {"n": 2}
        await qmp.execute("number", {"n": 3})
        with pytest.raises(trio.EndOfChannel):
            await stream.receive()


async def test_events_that_came_before_qemu_went_are_still_read_and_then_the_stream_ends(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    async def last_words(server: FakeQmp, command: dict[str, Any]) -> None:
        await server.event("SHUTDOWN", guest=True, reason="guest-shutdown")
        server.hang_up()

    server = await serve(nursery, tmp_path, last_words)
    async with open_qmp(server.path) as qmp:
        with qmp.events() as stream:
            with pytest.raises(QmpDisconnected):
                await qmp.execute("quit")
            assert [event.name async for event in stream] == ["SHUTDOWN"]
        with qmp.events() as late:
            assert [event async for event in late] == []


async def test_a_descriptor_really_arrives_and_ours_stays_ours(nursery: trio.Nursery, tmp_path: Path) -> None:
    server = await serve(nursery, tmp_path)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        async with open_qmp(server.path) as qmp:
            await qmp.hand_over("curling-migration", theirs.fileno())
            assert server.commands[-1]["arguments"] == {"fdname": "curling-migration"}
            (arrived,) = server.fds
            assert arrived != theirs.fileno()
            theirs.close()
            os.write(arrived, b"from QEMU")
            assert ours.recv(100) == b"from QEMU"


async def test_several_descriptors_come_with_one_command(nursery: trio.Nursery, tmp_path: Path) -> None:
    server = await serve(nursery, tmp_path)
    one, two = socket.socketpair()
    with one, two:
        async with open_qmp(server.path) as qmp:
            await qmp.execute("add-fd", {"fdset-id": 1}, fds=[one.fileno(), two.fileno()])
            assert len(server.fds) == 2


async def test_no_answer_in_time_is_said_and_the_monitor_goes_on(
    nursery: trio.Nursery, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    late: list[dict[str, Any]] = []

    async def keep(server: FakeQmp, command: dict[str, Any]) -> None:
        late.append(command)

    server = await serve(nursery, tmp_path, keep)
    async with open_qmp(server.path) as qmp:
        with pytest.raises(QmpTimeout) as caught:
            await qmp.execute("stop", timeout=3)
        assert (caught.value.command, caught.value.seconds) == ("stop", 3)
        assert trio.current_time() == pytest.approx(3, abs=0.01)
        await server.returns(late.pop(), "too late")
        server.answer = answer_at_once
        assert await qmp.execute("cont") == "cont"


async def test_a_command_that_could_only_be_sent_in_part_ends_the_monitor(
    nursery: trio.Nursery, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """The next one would be read by QEMU as the rest of it."""
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    path = tmp_path / "qmp.sock"
    await listener.bind(str(path))
    listener.listen(1)

    async def reads_two_lines() -> None:
        connection, _ = await listener.accept()
        with connection:
            await connection.send(
                b'{"QMP":{"version":{"qemu":{"major":9,"minor":0,"micro":0}},"capabilities":[]}}\n'
            )
            await connection.recv(1000)
            await connection.send(b'{"return": {}, "id": 1}\n')
            await trio.sleep_forever()

    nursery.start_soon(reads_two_lines)
    with listener:
        async with open_qmp(path) as qmp:
            with pytest.raises(QmpTimeout):
                await qmp.execute("long", {"text": "x" * (8 << 20)}, timeout=1)
            with pytest.raises(QmpDisconnected):
                await qmp.execute("short", timeout=1)
            assert qmp.disconnected.is_set()
        nursery.cancel_scope.cancel()


async def test_qemu_dying_with_commands_under_way_is_one_disconnection_for_each(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    server = await serve(nursery, tmp_path, never)
    ended: list[str | None] = []
    async with open_qmp(server.path) as qmp:

        async def ask(name: str) -> None:
            with pytest.raises(QmpDisconnected) as caught:
                await qmp.execute(name)
            ended.append(caught.value.command)

        async with trio.open_nursery() as asking:
            for name in ("one", "two", "three"):
                asking.start_soon(ask, name)
            await trio.testing.wait_all_tasks_blocked()
            server.hang_up()
        assert sorted(map(str, ended)) == ["one", "three", "two"]
        assert qmp.disconnected.is_set()
        with pytest.raises(QmpDisconnected):
            await qmp.execute("four")


async def test_the_disconnection_leaves_the_block_as_itself_and_not_in_a_group(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    async def die(server: FakeQmp, command: dict[str, Any]) -> None:
        server.hang_up()

    server = await serve(nursery, tmp_path, die)
    with pytest.raises(QmpDisconnected):
        async with open_qmp(server.path) as qmp:
            await qmp.execute("migrate")


async def test_garbage_in_the_middle_is_a_disconnection(nursery: trio.Nursery, tmp_path: Path) -> None:
    async def babble(server: FakeQmp, command: dict[str, Any]) -> None:
        await server.say_raw(b"\x00\x01 what is this\n")

    server = await serve(nursery, tmp_path, babble)
    async with open_qmp(server.path) as qmp:
        with pytest.raises(QmpDisconnected):
            await qmp.execute("query-status")


@pytest.mark.parametrize(
    ("greeting", "got"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", "SSH-2.0-OpenSSH_9.2p1 Debian"),
        (b"QEMU 11.1.3 monitor - type 'help'\r\n(qemu) ", "QEMU 11.1.3 monitor - type 'help'"),
        (b'{"return": {}, "id": 1}\n', "Return"),
    ],
)
async def test_what_is_not_a_monitor_is_said_with_its_first_words(
    nursery: trio.Nursery, tmp_path: Path, greeting: bytes, got: str
) -> None:
    server = await serve(nursery, tmp_path, greeting=greeting)
    with pytest.raises(QmpNotQmp) as caught:
        async with open_qmp(server.path):
            raise AssertionError("it was let in")
    assert caught.value.path == str(server.path)
    assert caught.value.got.startswith(got)


async def test_one_that_hangs_up_at_once_is_a_disconnection(nursery: trio.Nursery, tmp_path: Path) -> None:
    server = FakeQmp(tmp_path / "qmp.sock")
    server.say = _hang_up_instead(server)  # type: ignore[method-assign]
    await nursery.start(server.serve)
    with pytest.raises(QmpDisconnected) as caught:
        async with open_qmp(server.path):
            raise AssertionError("it was let in")
    assert caught.value.command is None


def _hang_up_instead(server: FakeQmp) -> Any:
    async def say(message: dict[str, Any]) -> None:
        server.hang_up()

    return say


async def test_a_monitor_that_another_client_holds_is_said_to_be_busy(
    nursery: trio.Nursery, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    server = await serve(nursery, tmp_path)
    async with open_qmp(server.path):
        # QEMU takes a second connection into its backlog and greets it when the first has gone.
        with pytest.raises(QmpBusy) as caught:
            async with open_qmp(server.path):
                raise AssertionError("it was let in")
        assert caught.value.path == str(server.path)
        assert trio.current_time() == pytest.approx(GREETING_TIMEOUT, abs=0.01)


async def test_one_who_knows_that_qemu_is_just_being_started_waits_longer(
    nursery: trio.Nursery, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    server = await serve(nursery, tmp_path, greeting=b"")

    async def greet_late() -> None:
        await trio.sleep(5 * GREETING_TIMEOUT)
        await server.say(GREETING)

    nursery.start_soon(greet_late)
    async with open_qmp(server.path, patience=10 * GREETING_TIMEOUT) as qmp:
        assert qmp.greeting.version == (11, 1, 3)
    assert trio.current_time() == pytest.approx(5 * GREETING_TIMEOUT, abs=0.01)


async def test_a_monitor_with_a_full_backlog_is_said_to_be_busy(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    path = str(tmp_path / "qmp.sock")
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as others:
        listener.bind(path)
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                other = others.enter_context(socket.socket(socket.AF_UNIX))
                other.setblocking(False)
                other.connect(path)
        with pytest.raises(QmpBusy):
            async with open_qmp(path):
                raise AssertionError("it was let in")


async def test_a_missing_socket_and_one_nobody_listens_on_are_unreachable(tmp_path: Path) -> None:
    with pytest.raises(QmpUnreachable) as caught:
        async with open_qmp(tmp_path / "missing.sock"):
            pass
    assert caught.value.problem == "No such file or directory"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    with pytest.raises(QmpUnreachable) as caught:
        async with open_qmp(tmp_path / "dead.sock"):
            pass
    assert caught.value.problem == "Connection refused"


async def test_a_path_too_long_for_a_socket_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(QmpUnreachable):
        async with open_qmp(tmp_path / ("x" * 200)):
            pass


async def test_a_socket_we_may_not_open_is_unreachable(nursery: trio.Nursery, tmp_path: Path) -> None:
    server = await serve(nursery, tmp_path)
    server.path.chmod(0)
    with unprivileged(), pytest.raises(QmpUnreachable) as caught:
        async with open_qmp(server.path):
            raise AssertionError("it was let in")
    assert caught.value.problem == "Permission denied"
    nursery.cancel_scope.cancel()


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Root opens everything; nobody does not."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


async def test_commands_wait_for_no_event_reader_and_need_none(nursery: trio.Nursery, tmp_path: Path) -> None:
    async def chatty(server: FakeQmp, command: dict[str, Any]) -> None:
        await server.event("NOISE")
        await server.returns(command, command["id"])

    server = await serve(nursery, tmp_path, chatty)
    async with open_qmp(server.path) as qmp:
        numbers = [await qmp.execute("next") for _ in range(100)]
    assert numbers == sorted(set(numbers)), "no id is used twice"


async def test_every_error_of_the_client_is_a_qmp_error() -> None:
    for error in (QmpBusy, QmpCommandFailed, QmpDisconnected, QmpNotQmp, QmpTimeout, QmpUnreachable):
        assert issubclass(error, QmpError)


@pytest.mark.parametrize("seed", range(8))
async def test_what_qemu_says_while_it_stays_unread_comes_afterwards(
    nursery: trio.Nursery, tmp_path: Path, seed: int
) -> None:
    server = await serve(nursery, tmp_path)
    pauses = random.Random(seed)
    async with open_qmp(server.path) as qmp:
        with qmp.events() as events, trio.fail_after(60):
            for _ in range(20):
                # The reader may be anywhere when it is told to stop.
                for _ in range(pauses.randrange(4)):
                    await trio.lowlevel.checkpoint()
                async with qmp.unread():
                    await server.event("STOP")
                    await trio.testing.wait_all_tasks_blocked()
                    with pytest.raises(trio.WouldBlock):
                        events.receive_nowait()
                assert (await events.receive()).name == "STOP"
                if pauses.randrange(2):
                    assert await qmp.execute("query-status") == "query-status"


async def test_several_commands_at_once_go_in_order(nursery: trio.Nursery, tmp_path: Path) -> None:
    server = await serve(nursery, tmp_path)
    async with open_qmp(server.path) as qmp:
        assert await qmp.execute_all([("stop", None), ("cont", None)]) == ["stop", "cont"]
        assert [command["execute"] for command in server.commands[-2:]] == ["stop", "cont"]


async def test_a_thread_can_ask_while_qemu_stays_unread_and_events_come_afterwards(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    server = await serve(nursery, tmp_path)
    async with open_qmp(server.path) as qmp:
        with qmp.events() as events, trio.fail_after(60):
            for _ in range(20):
                async with qmp.unread():
                    await server.event("STOP")
                    answered = qmp.send_unread([("qom-set", {"value": "off"}), ("qom-set", {"value": "on"})])
                    await server.event("RESUME")
                    await trio.to_thread.run_sync(answered)
                    with pytest.raises(trio.WouldBlock):
                        events.receive_nowait()
                assert [(await events.receive()).name for _ in range(2)] == ["STOP", "RESUME"]
                assert await qmp.execute("query-status") == "query-status"
