"""A Varlink service on Trio: one interface, its methods, any number of connections.

    service = Service(interface, {"List": list_vms, ...}, identity, needs_more=frozenset({"Watch"}))
    await trio.serve_listeners(partial(serve_connection, service=service), listeners)

A method is `async def method(request) -> parameters`. When the client asked for `more` it may send replies
before its last with `await request.reply_more(parameters)`; when the client did not, that does nothing, so a
method is written once for both. Calls of one connection run one after the other, those of different
connections beside each other.

What happens to a call when its client goes away: with `more`, the method is cancelled, since nobody listens;
without, it runs to its end, so that a failover is not left half done by a Ctrl-C. A method whose work must
outlive a `more` call does it in a nursery of its own and only reports here.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio
from attrs import field, frozen

from curling_fd.errors import CurlingError, VarlinkError
from curling_fd.varlink import introspection, protocol
from curling_fd.varlink.failures import error_reply, internal_error_reply
from curling_fd.varlink.idl import Interface, Mismatch
from curling_fd.varlink.introspection import Identity
from curling_fd.varlink.peer import Peer, peer_of
from curling_fd.varlink.protocol import Call, Reply

log = logging.getLogger(__name__)

_RECEIVE_SIZE = 65536
_QUEUED_CALLS = 16
"""Calls of one connection that wait for their turn; then we stop reading from it."""


@frozen
class Request:
    """One call, as its method sees it."""

    method: str
    """Its own name, without the interface."""
    parameters: Mapping[str, Any]
    """They fit the interface; nullable ones may be absent."""
    more: bool
    peer: Peer
    _send: Callable[[Reply], Awaitable[None]] = field(repr=False)

    async def reply_more(self, parameters: Mapping[str, Any]) -> None:
        """Send a reply that is not the last; nothing happens when the client did not ask for `more`.

        Not from two tasks at once.
        """
        if self.more:
            await self._send(Reply(parameters, continues=True))
        else:
            await trio.lowlevel.checkpoint()


Method = Callable[[Request], Awaitable[Mapping[str, Any]]]


def allow_all(peer: Peer, method: str) -> None:
    """Let everybody who can connect call everything."""


@frozen
class Service:
    """What is served, the same for all connections.

    Args:
        interface: whose description is the truth about parameters.
        methods: by their own names. What the interface has and this lacks is answered MethodNotImplemented.
        identity: for GetInfo.
        needs_more: methods without a last reply; without `more` they are answered ExpectedMore.
        authorize: called with the peer and the method's name before a method; raises `NotPermitted`.
        check_replies: hold replies to the interface too; one that does not fit is an internal error. For
        tests.
    """

    interface: Interface
    methods: Mapping[str, Method]
    identity: Identity
    needs_more: frozenset[str] = frozenset()
    authorize: Callable[[Peer, str], None] = allow_all
    check_replies: bool = False

    def __attrs_post_init__(self) -> None:
        unknown = ({*self.methods} | self.needs_more) - {*self.interface.methods}
        if unknown:
            raise ValueError(f"{self.interface.name} has no {', '.join(sorted(unknown))}")


async def serve_connection(stream: trio.SocketStream, service: Service) -> None:
    """Answer the calls of one client until it goes away. Takes ownership of `stream` and closes it.

    Nothing a client does or a method raises comes out of here, except being cancelled.
    """
    async with stream:
        try:
            peer = peer_of(stream.socket)
        except OSError as error:
            log.warning("a connection without credentials was closed: %s", error)
            return
        await _Connection(stream, service, peer).run()


class _Connection:
    def __init__(self, stream: trio.SocketStream, service: Service, peer: Peer) -> None:
        self._stream = stream
        self._service = service
        self._peer = peer
        self._gone = False
        self._more_scope: trio.CancelScope | None = None

    async def run(self) -> None:
        put, get = trio.open_memory_channel[Call](_QUEUED_CALLS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive, put)
            async with get:
                async for call in get:
                    await self._handle(call)

    async def _receive(self, put: trio.MemorySendChannel[Call]) -> None:
        reader = protocol.MessageReader()
        async with put:
            try:
                while data := await self._stream.receive_some(_RECEIVE_SIZE):
                    reader.feed(data)
                    while (message := reader.next_message()) is not None:
                        await put.send(protocol.parse_call(message))
                reader.check_end()
            except VarlinkError as error:
                log.warning(
                    "pid %d, uid %d was cut off: it sent %s", self._peer.pid, self._peer.uid, error.problem
                )
            except trio.BrokenResourceError:
                pass
            self._lose_client()

    async def _handle(self, call: Call) -> None:
        if not call.more:
            reply = await self._answer(call)
        elif self._gone:
            return
        else:
            with trio.CancelScope() as self._more_scope:
                reply = await self._answer(call)
            caught, self._more_scope = self._more_scope.cancelled_caught, None
            if caught:
                return
        if not call.oneway:
            await self._send(reply)

    async def _answer(self, call: Call) -> bytes:
        """Make the last reply of a call, whatever happens."""
        try:
            return protocol.encode_reply(await self._dispatch(call))
        except Exception as raised:
            error = _only(raised)
            if isinstance(error, CurlingError):
                log.debug("%s: %s", call.method, error)
                return protocol.encode_reply(error_reply(error))
            log.error("%s failed unexpectedly", call.method, exc_info=error)
            return protocol.encode_reply(internal_error_reply())

    async def _dispatch(self, call: Call) -> Reply:
        service = self._service
        interface_name, name = protocol.split_method(call.method)
        known = {service.interface.name: service.interface, introspection.SERVICE.name: introspection.SERVICE}
        interface = known.get(interface_name)
        if interface is None:
            return protocol.interface_not_found(interface_name)
        described = interface.methods.get(name)
        if described is None:
            return protocol.method_not_found(call.method)
        method = service.methods.get(name)
        if call.upgrade or (interface is service.interface and method is None):
            return protocol.method_not_implemented(call.method)
        try:
            interface.check(described.takes, call.parameters)
        except Mismatch as mismatch:
            return protocol.invalid_parameter(mismatch.parameter)
        if method is None:
            return introspection.answer(service.identity, service.interface, name, call.parameters)
        if name in service.needs_more and not call.more:
            return protocol.expected_more()
        service.authorize(self._peer, name)

        async def send(reply: Reply) -> None:
            if service.check_replies:
                interface.check(described.gives, reply.parameters)
            await self._send(protocol.encode_reply(reply))

        reply = Reply(await method(Request(name, call.parameters, call.more, self._peer, send)))
        if service.check_replies:
            interface.check(described.gives, reply.parameters)
        return reply

    async def _send(self, reply: bytes) -> None:
        try:
            await self._stream.send_all(reply)
        except trio.BrokenResourceError:
            self._lose_client()
            await trio.lowlevel.checkpoint()

    def _lose_client(self) -> None:
        self._gone = True
        if self._more_scope is not None:
            self._more_scope.cancel()


def _only(error: Exception) -> Exception:
    """Take a lone exception out of the groups that nurseries wrap around it."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
