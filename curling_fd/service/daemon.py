"""curlingd: the daemon of one host.

It listens for `curlingctl` on a UNIX socket and for the daemons of other hosts on TCP, and keeps every VM of
its configuration protected or backed up as asked. Under systemd the control socket comes by socket activation
under the name `control`; without systemd it makes its own and runs in the foreground just the same.
"""

from __future__ import annotations

import argparse
import grp
import logging
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio

from curling_fd import __version__
from curling_fd.disk.markers import MarkerStore
from curling_fd.errors import (
    CannotListen,
    ConfigError,
    CurlingError,
    FrameError,
    LinkLost,
    NoSuchVm,
    PeerIncompatible,
)
from curling_fd.journald import sender as journald
from curling_fd.journald.messages import Message
from curling_fd.link.frames import PROTOCOL, Kind
from curling_fd.link.transport import FrameLink, Received
from curling_fd.sentences import Sentence, sentence
from curling_fd.service.api import Api
from curling_fd.service.config import Config, load
from curling_fd.service.facts import answer
from curling_fd.service.greeting import GREETING_TIMEOUT, check_secure
from curling_fd.service.host import Host
from curling_fd.service.journal import Journal
from curling_fd.service.restart import estates
from curling_fd.service.store import Store
from curling_fd.service.vm import Vm
from curling_fd.system import privileges, systemd
from curling_fd.varlink.listener import open_listener
from curling_fd.varlink.server import serve_connection

_logger = logging.getLogger("curling")

#: Seconds a thread may hold the interpreter while another waits: the capture of one VM must not wait for the
#: bookkeeping of another. Python's own 5 ms would be longer than a checkpoint.
_SWITCH_INTERVAL = 0.0005

#: Links that say nothing of use yet, at most; more are closed at once.
_MAX_STRANGERS = 64

#: A VM taken over every second since 1970 is not there yet; what follows it must still fit a frame.
_MAX_GENERATION = 1 << 40


class Daemon:
    """Everything of one curlingd. `run` returns after SIGTERM or SIGINT."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._vms: dict[str, Vm] = {}
        self._strangers = 0

    async def run(self) -> None:
        """Serve until told to stop.

        Raises:
            ConfigError: a socket or a directory of the configuration cannot be used.
            CannotListen: the address for other hosts is not to be had now.
        """
        config = self._config.daemon
        for directory in (config.state_directory, config.runtime_directory):
            _make(directory)
        control = self._control_listener()
        links = await self._link_listeners()
        async with trio.open_nursery() as nursery:
            state = config.state_directory
            host = Host(config, Store(state), Journal(), nursery, MarkerStore(state))
            self._vms |= {name: Vm(vm, host) for name, vm in self._config.vms.items()}
            service = Api(host, self._vms).service()
            nursery.start_soon(
                partial(trio.serve_listeners, partial(serve_connection, service=service), [control])
            )
            nursery.start_soon(partial(trio.serve_listeners, self._serve_link, list(links)))
            nursery.start_soon(self._feed_watchdog)
            left = estates(self._vms)
            for name, vm in self._vms.items():
                vm.start(left.get(name))
            systemd.notify("READY=1", f"STATUS={self._status()}")
            _logger.info("curlingd %s on %s: %s", __version__, config.host_name, self._status())
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for number in signals:
                    _logger.info("%s: stopping, guests run on", signal.Signals(number).name)
                    break
            systemd.notify("STOPPING=1")
            async with trio.open_nursery() as stopping:
                for vm in self._vms.values():
                    stopping.start_soon(vm.stop)
            nursery.cancel_scope.cancel()
        if not systemd.is_activated("control"):
            Path(config.control_socket).unlink(missing_ok=True)

    def _control_listener(self) -> trio.SocketListener:
        config = self._config.daemon
        inherited = systemd.activated("control")
        if inherited is not None:
            return trio.SocketListener(trio.socket.from_stdlib_socket(inherited))
        group = config.control_group if os.getuid() == 0 and _group_exists(config.control_group) else None
        return open_listener(config.control_socket, group)

    async def _link_listeners(self) -> Sequence[trio.SocketListener]:
        address = self._config.daemon.listen
        try:
            return await trio.open_tcp_listeners(address.port, host=address.host)
        except OSError as error:
            raise CannotListen(str(address), _why(error)) from None

    async def _serve_link(self, stream: trio.SocketStream) -> None:
        """One connection of another daemon."""
        if self._strangers >= _MAX_STRANGERS:
            stream.socket.close()
            return
        link: FrameLink | None = None
        try:
            link = FrameLink(stream.socket)
            self._strangers += 1
            try:
                vm, hello = await self._introduced(stream.socket, link)
                if hello.header.kind is Kind.PROBE:
                    await answer(link, vm.record, hello)
                    return
            finally:
                self._strangers -= 1
            await vm.follow(link, hello)
        except LinkLost:
            pass  # somebody looked whether we are here
        except CurlingError as error:
            _logger.warning("a link from another host was refused: %s", error)
        except Exception as error:
            # Whatever one peer sends or does: the VMs of the others, and the guests here, must not feel it.
            _logger.error("a link from another host ended unexpectedly", exc_info=error)
        finally:
            if link is not None:
                link.close()
            else:
                stream.socket.close()

    async def _introduced(self, sock: trio.socket.SocketType, link: FrameLink) -> tuple[Vm, Received]:
        """The VM that the peer names in its greeting.

        Raises:
            CurlingError: it is none of ours, or the peer does not speak our protocol; it has been told.
        """
        hello: Received | None = None
        try:
            check_secure(sock, self._config.daemon.insecure)
            with trio.move_on_after(GREETING_TIMEOUT):
                hello = await link.receive()
            if hello is None or hello.header.kind not in (Kind.HELLO, Kind.PROBE):
                raise FrameError("the peer did not greet")
            if hello.header.generation > _MAX_GENERATION:
                raise FrameError(f"generation {hello.header.generation}, which nobody reaches by takeovers")
            theirs = hello.content.get("protocol")
            if theirs != PROTOCOL:
                raise PeerIncompatible(PROTOCOL, theirs if isinstance(theirs, int) else 0)
            name = hello.content.get("vm")
            if not isinstance(name, str) or name not in self._vms:
                raise NoSuchVm(str(name))
            return self._vms[name], hello
        except CurlingError as error:
            words = sentence(error)
            content = {"kind": type(error).__name__, "text": words.text, "remedy": words.remedy}
            with trio.move_on_after(1.0):
                await link.send(Kind.REFUSE, 0, content=content | {"protocol": PROTOCOL})
            raise

    async def _feed_watchdog(self) -> None:
        """Tell systemd what the VMs do; and that we live, while event loop, threads and checkpoints move."""
        interval = systemd.watchdog_interval()
        while True:
            await trio.to_thread.run_sync(_nothing)
            alive = interval is not None and not any(vm.stuck for vm in self._vms.values())
            systemd.notify(f"STATUS={self._status()}", *(["WATCHDOG=1"] if alive else []))
            await trio.sleep(interval / 2 if interval else 5.0)

    def _status(self) -> str:
        counts: dict[str, int] = {}
        for vm in self._vms.values():
            counts[vm.record.state.value] = counts.get(vm.record.state.value, 0) + 1
        return ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "no VMs configured"


def _nothing() -> None:
    """What a thread does to show that threads can be had."""


def _why(error: OSError) -> str:
    """The problem without the address, which Trio's own words repeat."""
    known = error.errno is not None and error.errno > 0
    return os.strerror(error.errno) if known and error.errno is not None else error.strerror or str(error)


def _make(directory: str) -> None:
    try:
        Path(directory).mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(directory, f"cannot be made: {error.strerror or error}") from None


def _group_exists(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def _say_why_not(words: Sentence, handler: logging.Handler) -> None:
    """Tell whoever started us why there is no daemon."""
    said = f"{words.text}\n{words.remedy}"
    if isinstance(handler, journald.JournalHandler):
        _logger.critical("%s", said, extra={journald.EXTRA: {"MESSAGE_ID": Message.CANNOT_START.value}})
    else:
        print(f"curlingd: {said}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program `curlingd`."""
    parser = argparse.ArgumentParser(prog="curlingd", description="Keeps VMs alive when their host dies.")
    parser.add_argument("--config", metavar="FILE", help="instead of /etc/curling/curlingd.toml")
    parser.add_argument("--verbose", action="store_true", help="log details")
    parser.add_argument("--version", action="version", version=f"curlingd {__version__}")
    options = parser.parse_args(arguments)
    handler = journald.handler(os.environ)
    logging.basicConfig(level=logging.DEBUG if options.verbose else logging.INFO, handlers=[handler])
    sys.setswitchinterval(_SWITCH_INTERVAL)
    try:
        config = load(options.config)
        privileges.drop()
        trio.run(Daemon(config).run, strict_exception_groups=True)
    except CurlingError as error:
        _say_why_not(sentence(error), handler)
        # systemd starts us again after anything but this, which only an administrator can mend. An address we
        # cannot listen on may be given to the host a moment later, or be free once another program has ended.
        return os.EX_CONFIG if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
