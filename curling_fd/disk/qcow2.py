"""A copy in a qcow2 image, written by QEMU's own program: qemu-storage-daemon, over NBD.

No format is written by hand. The program ends with its copy, by SIGTERM, on which it writes all out and gives
up its locks; a guard kills it should this daemon be killed, so that no copy stays in use.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator

from curling_fd.disk.compare import block_digests
from curling_fd.disk.log import WRITE, Record
from curling_fd.disk.nbd_client import Change, NbdClient
from curling_fd.disk.spec import CopySpec
from curling_fd.errors import CopyUnusable, CopyWrongSize, DiskCopyFailed, NbdError, NbdRequestFailed
from curling_fd.system.guard import Guard, GuardFailed

#: Seconds for which the program may be silent: it may wait for a disk that is being flushed.
TIMEOUT = 30.0

#: Bytes of what it printed that are kept for people.
_STDERR_KEPT = 2000

_EXPORT = "copy"


class Qcow2Copy:
    """The image at `spec.path`, in the hands of `program` until `close`."""

    def __init__(self, spec: CopySpec, program: str = "qemu-storage-daemon") -> None:
        self.spec = spec
        self._closed = False
        self._guard: Guard | None = None
        self._pidfd = -1
        self._clients: list[NbdClient] = []
        self._syncing = threading.Lock()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the copy)
        try:
            with tempfile.TemporaryDirectory(prefix="curling-copy-") as folder:
                self._start(program, os.path.join(folder, "nbd"))
            # One for the work, one to sync beside it.
            self._client, self._syncer = self._clients
            if self._client.size != spec.whole:
                raise CopyWrongSize(spec.disk, spec.path, "qcow2", self._client.size, spec.size)
        except BaseException:
            self._end(kill=True)
            raise

    def apply(self, records: Iterable[Record], view: memoryview) -> None:
        """Do what `records`, found in `view`, say."""
        try:
            self._client.change(self._changes(records, view))
        except (NbdError, NbdRequestFailed) as error:
            raise self._failed(error) from None

    def block_digests(self, offset: int, length: int, block: int) -> Iterator[bytes]:
        """Digests of the blocks of that part."""
        client = self._client
        try:
            extents = ((extent.length, extent.zero) for extent in client.status(offset, length))
            yield from block_digests(offset, length, block, extents, client.read_into)
        except (NbdError, NbdRequestFailed) as error:
            raise self._failed(error) from None

    def sync(self) -> None:
        """All that has been applied is on stable storage."""
        try:
            with self._syncing:
                self._syncer.flush()
        except (NbdError, NbdRequestFailed) as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """End the program. Idempotent."""
        if not self._closed:
            self._end(kill=False)

    def _start(self, program: str, path: str) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with listener:
            listener.bind(path)
            listener.listen()
            fd = listener.fileno()
            try:
                self._process = subprocess.Popen(
                    _command(program, self.spec.path, fd),
                    pass_fds=[fd],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._stderr,
                    start_new_session=True,
                )
            except OSError as error:
                problem = f"{program}, which writes qcow2 images, cannot be started: {error.strerror}"
                raise CopyUnusable(self.spec.disk, self.spec.path, problem) from None
        self._pidfd = os.pidfd_open(self._process.pid)
        try:
            self._guard = Guard.start_kill(self._pidfd)
            for _ in range(2):
                self._clients.append(NbdClient.connect(path, _EXPORT, timeout=TIMEOUT))
        except (NbdError, GuardFailed) as error:
            problem = f"{program} does not open it: {self._printed() or error}"
            raise CopyUnusable(self.spec.disk, self.spec.path, problem) from None

    def _changes(self, records: Iterable[Record], view: memoryview) -> Iterator[Change]:
        for record in records:
            if record.kind == WRITE:
                yield Change.write(record.offset, view[record.data : record.data + record.length])
            else:
                # Not a trim: that may be left undone, and the copy is to read as zeroes.
                yield Change.zero(record.offset, record.length)

    def _printed(self) -> str:
        """What the program printed last."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _STDERR_KEPT))
        return self._stderr.read().decode("utf-8", "replace").strip().replace("\n", " / ")

    def _failed(self, error: Exception) -> DiskCopyFailed:
        words = error.words if isinstance(error, NbdRequestFailed) else str(error)
        return DiskCopyFailed(self.spec.path, self._printed() or words)

    def _end(self, *, kill: bool) -> None:
        """End the program and forget it. It has `TIMEOUT` seconds to write out what it holds."""
        self._closed = True
        for client in self._clients:
            client.close()
        ended = True
        if self._pidfd >= 0:
            if kill:
                self._process.kill()
            else:
                self._process.terminate()
            try:
                self._process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                ended = False
                self._process.kill()
            if self._guard is not None:
                self._guard.retire()
            os.close(self._pidfd)
            self._pidfd = -1
        self._stderr.close()
        if not ended:
            raise DiskCopyFailed(self.spec.path, f"it could not be written out within {TIMEOUT:g} s")


def _command(program: str, path: str, listener: int) -> list[str]:
    driver = "file" if os.path.isfile(path) else "host_device"
    file = {"driver": driver, "filename": path, "discard": "unmap"}
    image = {"driver": "qcow2", "node-name": "copy", "discard": "unmap", "file": file}
    return [
        program,
        *("--blockdev", json.dumps(image)),
        *("--nbd-server", f"addr.type=fd,addr.str={listener}"),
        *("--export", f"type=nbd,id={_EXPORT},node-name=copy,name={_EXPORT},writable=on"),
    ]
