"""Making a waiting standby the running VM: load what it does not map, and let it go."""

from __future__ import annotations

import socket
from pathlib import Path

import trio

from curling_fd.capture.settings import set_capabilities
from curling_fd.errors import QmpError, StandbyFailed
from curling_fd.qmp.client import EventStream, open_qmp
from curling_fd.replica.image import Replica

_FD_NAME = "curling-restore"

#: Seconds for a standby to load the small blocks and the device state, and to run.
LOAD_TIMEOUT = 10.0


async def activate(qmp_path: Path, replica: Replica, *, paused: bool) -> None:
    """Run the VM in the standby behind the monitor `qmp_path` from the checkpoint that `replica` is.

    Args:
        paused: leave the guest stopped, as the operator had it.

    Raises:
        StandbyFailed: QEMU did not take the state.
    """
    ours, theirs = socket.socketpair()
    try:
        with trio.fail_after(LOAD_TIMEOUT):
            async with open_qmp(qmp_path) as qmp:
                with qmp.events() as events:
                    # Disks are not locked, nor looked at, before the guest runs: until then they are the
                    # copies of a daemon, which goes on writing to them after a rehearsal.
                    await set_capabilities(qmp, {"events": True, "late-block-activate": True})
                    await qmp.hand_over(_FD_NAME, theirs.fileno())
                    theirs.close()
                    await qmp.execute("migrate-incoming", {"uri": f"fd:{_FD_NAME}"})
                    await trio.to_thread.run_sync(_send, ours, replica)
                    await _loaded(events)
                    # With it on, the VM could not be protected from here by background snapshots.
                    await set_capabilities(qmp, {"late-block-activate": False})
                    if not paused:
                        await qmp.execute("cont")
                        await _resumed(events)
    except trio.TooSlowError:
        raise StandbyFailed(f"the VM did not run within {LOAD_TIMEOUT:g} s") from None
    except QmpError as error:
        raise StandbyFailed(str(error)) from None
    finally:
        ours.close()
        theirs.close()


async def _loaded(events: EventStream) -> None:
    async for event in events:
        status = event.data.get("status") if event.name == "MIGRATION" else None
        if status == "completed":
            return
        if status == "failed":
            raise StandbyFailed("QEMU could not load the checkpoint")
    raise StandbyFailed("QEMU went away while it loaded the checkpoint")


async def _resumed(events: EventStream) -> None:
    async for event in events:
        if event.name == "RESUME":
            return
    raise StandbyFailed("QEMU went away when it was to run")


def _send(sock: socket.socket, replica: Replica) -> None:
    sock.settimeout(LOAD_TIMEOUT)
    try:
        for piece in replica.restore():
            sock.sendall(piece)
        # QEMU reads on for a description of the state, which no checkpoint has, until the stream ends.
        sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        raise StandbyFailed(f"QEMU stopped taking the checkpoint: {error.strerror or error}") from None
