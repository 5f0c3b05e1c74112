"""The Varlink server and client, over socket pairs and a socket in a temporary directory."""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from curling_fd import errors
from curling_fd.varlink import idl, introspection, protocol
from curling_fd.varlink.client import Client
from curling_fd.varlink.introspection import Identity
from curling_fd.varlink.listener import open_listener
from curling_fd.varlink.peer import Peer, peer_of
from curling_fd.varlink.protocol import ErrorReply
from curling_fd.varlink.server import Method, Request, Service, serve_connection

INTERFACE = idl.parse("""
interface io.curling.Control
method Echo(text: string, times: ?int) -> (text: string)
method Count(to: ?int) -> (count: int)
method Wait() -> ()
method Forever() -> (count: int)
method Missing() -> ()
""")
IDENTITY = Identity("vendor", "product", "1.0", "https://example.org")


async def echo(request: Request) -> Mapping[str, Any]:
    return {"text": request.parameters["text"] * request.parameters.get("times", 1)}


async def count(request: Request) -> Mapping[str, Any]:
    last = request.parameters.get("to") or 3
    for number in range(1, last):
        await request.reply_more({"count": number})
    return {"count": last}


def service(**methods: Method) -> Service:
    names = {name.capitalize(): method for name, method in ({"echo": echo, "count": count} | methods).items()}
    return Service(INTERFACE, names, IDENTITY, needs_more=frozenset({"Forever"}), check_replies=True)


async def pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    ours, theirs = trio.socket.socketpair()
    return trio.SocketStream(ours), trio.SocketStream(theirs)


@asynccontextmanager
async def connected(served: Service) -> AsyncIterator[Client]:
    ours, theirs = await pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, theirs, served)
        async with Client(ours, "the-path") as client:
            yield client


async def exchange(served: Service, sent: bytes) -> list[dict[str, Any]]:
    """Send raw bytes, end our half, and return every reply until the server closes."""
    ours, theirs = await pair()
    received = b""
    async with trio.open_nursery() as nursery, ours:
        nursery.start_soon(serve_connection, theirs, served)
        await ours.send_all(sent)
        await ours.send_eof()
        async for data in ours:
            received += data
    return [json.loads(message) for message in received.split(b"\0")[:-1]]


def call(method: str, **more: Any) -> bytes:
    return protocol.encode({"method": f"io.curling.Control.{method}", **more})


async def test_a_call_is_answered() -> None:
    async with connected(service()) as client:
        assert await client.call("Echo", {"text": "a", "times": 3}) == {"text": "aaa"}
        assert await client.call("Echo", {"text": "b"}) == {"text": "b"}


async def test_a_call_with_more_gets_all_its_replies_and_frees_the_connection() -> None:
    async with connected(service()) as client:
        assert [reply["count"] async for reply in await client.call_more("Count", {"to": 4})] == [1, 2, 3, 4]
        assert await client.call("Echo", {"text": "b"}) == {"text": "b"}


async def test_the_same_method_without_more_gives_its_last_reply_only() -> None:
    async with connected(service()) as client:
        assert await client.call("Count") == {"count": 3}


async def test_the_service_describes_itself() -> None:
    async with connected(service()) as client:
        info = await client.call("org.varlink.service.GetInfo")
        assert info["interfaces"] == ["io.curling.Control", "org.varlink.service"]
        assert info["version"] == "1.0"
        for interface, text in (
            (INTERFACE.name, INTERFACE.text),
            ("org.varlink.service", introspection.SERVICE.text),
        ):
            described = await client.call(
                "org.varlink.service.GetInterfaceDescription", {"interface": interface}
            )
            assert described == {"description": text}


@pytest.mark.parametrize(
    ("method", "parameters", "error", "facts"),
    [
        ("com.example.Do", {}, "InterfaceNotFound", {"interface": "com.example"}),
        ("Nothing", {}, "MethodNotFound", {"method": "io.curling.Control.Nothing"}),
        ("Missing", {}, "MethodNotImplemented", {"method": "io.curling.Control.Missing"}),
        ("Echo", {}, "InvalidParameter", {"parameter": "text"}),
        ("Echo", {"text": 1}, "InvalidParameter", {"parameter": "text"}),
        ("Echo", {"text": "a", "tims": 1}, "InvalidParameter", {"parameter": "tims"}),
        ("Echo", {"text": "a", "times": 1.5}, "InvalidParameter", {"parameter": "times"}),
        ("Forever", {}, "MethodNotImplemented", {"method": "io.curling.Control.Forever"}),
        ("org.varlink.service.GetInfo", {"a": 1}, "InvalidParameter", {"parameter": "a"}),
        ("org.varlink.service.GetInterfaceDescription", {}, "InvalidParameter", {"parameter": "interface"}),
        (
            "org.varlink.service.GetInterfaceDescription",
            {"interface": "a.b"},
            "InterfaceNotFound",
            {"interface": "a.b"},
        ),
        ("org.varlink.service.Nothing", {}, "MethodNotFound", {"method": "org.varlink.service.Nothing"}),
    ],
)
async def test_a_wrong_call_is_answered_with_the_error_varlink_has_for_it(
    method: str, parameters: dict[str, Any], error: str, facts: dict[str, str]
) -> None:
    async with connected(service()) as client:
        with pytest.raises(ErrorReply) as caught:
            await client.call(method, parameters)
        assert caught.value.name == f"org.varlink.service.{error}"
        assert caught.value.parameters == facts
        assert await client.call("Echo", {"text": "still there"}) == {"text": "still there"}


async def test_an_endless_method_without_more_is_refused() -> None:
    async with connected(service(forever=count)) as client:
        with pytest.raises(ErrorReply) as caught:
            await client.call("Forever")
    assert caught.value.name == "org.varlink.service.ExpectedMore"


async def test_upgrades_are_not_implemented() -> None:
    (reply,) = await exchange(service(), call("Echo", parameters={"text": "a"}, upgrade=True))
    assert reply["error"] == "org.varlink.service.MethodNotImplemented"


async def test_calls_sent_in_one_go_are_answered_in_order_and_oneway_ones_not_at_all() -> None:
    sent = b"".join(
        [
            call("Echo", parameters={"text": "1"}),
            call("Echo", parameters={"text": "2"}, oneway=True),
            call("Nothing", oneway=True),
            call("Echo", parameters={"text": "3"}),
        ]
    )
    assert await exchange(service(), sent) == [{"parameters": {"text": "1"}}, {"parameters": {"text": "3"}}]


@pytest.mark.parametrize(
    "garbage", [b"hello\0", b"{}\0", b"\0", b'{"method": "a.b", "more": 3}\0', b"{", b"\xff" * 2_000_000]
)
async def test_a_client_that_sends_garbage_gets_what_it_had_asked_before_and_is_cut_off(
    garbage: bytes,
) -> None:
    ours, theirs = await pair()
    async with trio.open_nursery() as nursery, ours:
        nursery.start_soon(serve_connection, theirs, service())

        async def send() -> None:
            try:
                await ours.send_all(call("Echo", parameters={"text": "1"}) + garbage)
                await ours.send_eof()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

        nursery.start_soon(send)
        received = b""
        try:
            async for data in ours:
                received += data
        except trio.BrokenResourceError:  # closed with our bytes unread
            pass
    assert received == b'{"parameters":{"text":"1"}}\0'


@pytest.mark.parametrize(
    "raised", [errors.NoSuchVm("a", "b"), ExceptionGroup("nursery", [errors.NoSuchVm("a", "b")])]
)
async def test_an_error_of_ours_arrives_as_itself(raised: Exception) -> None:
    async def wait(request: Request) -> Mapping[str, Any]:
        raise raised

    async with connected(service(wait=wait)) as client:
        with pytest.raises(errors.NoSuchVm) as caught:
            await client.call("Wait")
        assert (caught.value.name, caught.value.nearest) == ("a", "b")
        assert await client.call("Echo", {"text": "a"}) == {"text": "a"}


async def test_an_error_reply_carries_text_remedy_and_facts() -> None:
    async def wait(request: Request) -> Mapping[str, Any]:
        raise errors.WritableDisk(("disk0", "disk1"))

    (reply,) = await exchange(service(wait=wait), call("Wait"))
    assert reply["error"] == "io.curling.Control.WritableDisk"
    assert set(reply["parameters"]) == {"text", "remedy", "facts"}
    assert reply["parameters"]["facts"] == {"devices": ["disk0", "disk1"]}


async def test_any_other_exception_is_logged_and_answered_and_the_daemon_lives_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def wait(request: Request) -> Mapping[str, Any]:
        raise ZeroDivisionError("secret detail")

    async with connected(service(wait=wait)) as client:
        with caplog.at_level(logging.ERROR), pytest.raises(ErrorReply) as caught:
            await client.call("Wait")
        assert await client.call("Echo", {"text": "a"}) == {"text": "a"}
    assert caught.value.name == "io.curling.Control.InternalError"
    assert "secret detail" not in str(caught.value)
    assert "secret detail" in caplog.text


@pytest.mark.parametrize("parameters", [{"text": 1}, {}, {"text": "a", "more": 1}, {"text": b"bytes"}])
async def test_a_reply_that_breaks_the_interface_is_our_own_error(parameters: dict[str, Any]) -> None:
    async def wrong(request: Request) -> Mapping[str, Any]:
        return parameters

    async with connected(service(echo=wrong)) as client:
        with pytest.raises(ErrorReply) as caught:
            await client.call("Echo", {"text": "a"})
    assert caught.value.name == "io.curling.Control.InternalError"


async def test_a_more_call_is_cancelled_when_its_client_goes_away() -> None:
    ended = trio.Event()

    async def wait(request: Request) -> Mapping[str, Any]:
        try:
            await request.reply_more({})
            await trio.sleep_forever()
        finally:
            ended.set()
        raise AssertionError("unreachable")

    async with connected(service(wait=wait)) as client:
        replies = await client.call_more("Wait")
        assert await anext(replies) == {}
        await client.aclose()
        await ended.wait()


async def test_a_more_call_is_cancelled_while_it_streams_to_a_client_that_stopped_reading() -> None:
    ended = trio.Event()

    async def forever(request: Request) -> Mapping[str, Any]:
        try:
            while True:
                await request.reply_more({"count": 1})
        finally:
            ended.set()

    async with connected(service(forever=forever)) as client:
        assert await anext(await client.call_more("Forever")) == {"count": 1}
        await trio.testing.wait_all_tasks_blocked()  # the socket's buffers are full
        await client.aclose()
        await ended.wait()


async def test_a_plain_call_runs_to_its_end_when_its_client_goes_away() -> None:
    started, go_on, done = trio.Event(), trio.Event(), trio.Event()

    async def wait(request: Request) -> Mapping[str, Any]:
        started.set()
        await go_on.wait()
        done.set()
        return {}

    ours, theirs = await pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, theirs, service(wait=wait))
        await ours.send_all(call("Wait"))
        await started.wait()
        await ours.aclose()
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
    assert done.is_set()


async def test_a_more_call_that_waits_its_turn_is_dropped_with_its_client() -> None:
    asked: list[str] = []

    async def wait(request: Request) -> Mapping[str, Any]:
        asked.append(request.method)
        return {}

    go_on = trio.Event()

    async def slow(request: Request) -> Mapping[str, Any]:
        await go_on.wait()
        return {"text": "a"}

    ours, theirs = await pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, theirs, service(wait=wait, echo=slow))
        await ours.send_all(call("Echo", parameters={"text": "a"}) + call("Wait", more=True))
        await ours.aclose()
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
    assert asked == []


async def test_methods_learn_who_calls() -> None:
    seen: list[Peer] = []

    async def wait(request: Request) -> Mapping[str, Any]:
        seen.append(request.peer)
        return {}

    async with connected(service(wait=wait)) as client:
        await client.call("Wait")
    (peer,) = seen
    assert (peer.pid, peer.uid) == (os.getpid(), os.getuid())
    assert peer.gids == {os.getgid(), *os.getgroups()}


async def test_who_may_not_is_refused_before_the_method_runs() -> None:
    def authorize(peer: Peer, method: str) -> None:
        raise errors.NotPermitted(method, "curling", peer.uid)

    served = Service(INTERFACE, {"Echo": echo}, IDENTITY, authorize=authorize)
    async with connected(served) as client:
        with pytest.raises(errors.NotPermitted) as caught:
            await client.call("Echo", {"text": "a"})
        assert caught.value.uid == os.getuid()
        assert await client.call("org.varlink.service.GetInfo")


async def test_the_credentials_of_a_socket_that_has_none_are_an_error() -> None:
    with trio.socket.socket(socket.AF_INET) as tcp, pytest.raises(OSError, match="No data available"):
        peer_of(tcp)


def test_a_method_the_interface_lacks_is_found_when_the_service_is_made() -> None:
    with pytest.raises(ValueError, match="has no Nothing"):
        Service(INTERFACE, {"Nothing": echo}, IDENTITY)


async def test_a_cancelled_wait_for_a_reply_loses_nothing() -> None:
    go_on = trio.Event()

    async def forever(request: Request) -> Mapping[str, Any]:
        await go_on.wait()
        await request.reply_more({"count": 1})
        return {"count": 2}

    async with connected(service(forever=forever)) as client:
        replies = await client.call_more("Forever")
        with trio.CancelScope() as scope:
            scope.cancel()
            await anext(replies)
        go_on.set()
        assert [reply["count"] async for reply in replies] == [1, 2]


async def test_a_second_call_while_one_streams_is_a_bug_of_the_caller() -> None:
    async with connected(service()) as client:
        assert await anext(await client.call_more("Count")) == {"count": 1}
        with pytest.raises(RuntimeError, match="earlier call"):
            await client.call("Count")


@pytest.mark.parametrize(
    ("sent", "raised"),
    [
        (b"", errors.DaemonUnreachable),
        (b'{"parameters"', errors.DaemonUnreachable),
        (b"SSH-2.0\0", errors.VarlinkError),
        (b'{"parameters":{},"continues":true}\0', errors.VarlinkError),
        (b"[]\0", errors.VarlinkError),
    ],
)
async def test_a_service_that_breaks_off_or_babbles_is_a_clear_error(
    sent: bytes, raised: type[Exception]
) -> None:
    ours, theirs = await pair()
    async with Client(ours, "the-path") as client:
        await theirs.send_all(sent)
        await theirs.aclose()
        with pytest.raises(raised):
            await client.call("Echo", {"text": "a"})


async def test_nobody_at_the_socket_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(errors.DaemonUnreachable) as caught:
        await Client.connect(str(tmp_path / "control.sock"))
    assert caught.value.problem == "No such file or directory"
    with pytest.raises(errors.DaemonUnreachable):
        await Client.connect(str(tmp_path / ("x" * 200)))
    (tmp_path / "plain").write_text("")
    with pytest.raises(errors.DaemonUnreachable):
        await Client.connect(str(tmp_path / "plain"))


async def test_a_socket_we_may_not_open_is_a_lack_of_rights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(path: str) -> trio.SocketStream:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(trio, "open_unix_socket", refuse)
    with pytest.raises(errors.NotPermitted) as caught:
        await Client.connect(str(tmp_path / "control.sock"))
    assert caught.value.uid == os.getuid()
    assert caught.value.group == "curling"


async def test_the_listener_replaces_a_dead_socket_and_is_not_open_to_others(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    for _ in range(2):  # the second finds what the first left behind
        listener = open_listener(str(path))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                partial(trio.serve_listeners, partial(serve_connection, service=service()), [listener])
            )
            async with await Client.connect(str(path)) as client:
                assert await client.call("Echo", {"text": "a"}) == {"text": "a"}
            nursery.cancel_scope.cancel()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_the_listener_is_open_to_its_group(tmp_path: Path) -> None:
    import grp

    path = tmp_path / "control.sock"
    async with open_listener(str(path), grp.getgrgid(os.getgid()).gr_name):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert path.stat().st_gid == os.getgid()


async def test_a_path_in_use_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with open_listener(str(path)):
        with pytest.raises(errors.ConfigError, match="another service listens"):
            open_listener(str(path))
    plain = tmp_path / "plain"
    plain.write_text("precious")
    with pytest.raises(errors.ConfigError, match="in use"):
        open_listener(str(plain))
    assert plain.read_text() == "precious"
    with pytest.raises(errors.ConfigError, match="no group 'no-such-group'"):
        open_listener(str(tmp_path / "other"), "no-such-group")
    with pytest.raises(errors.ConfigError, match="No such file"):
        open_listener(str(tmp_path / "nowhere" / "control.sock"))
