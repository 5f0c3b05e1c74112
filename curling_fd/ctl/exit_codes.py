"""With what curlingctl exits, so that scripts need not read sentences."""

from __future__ import annotations

from enum import IntEnum

from curling_fd import errors
from curling_fd.errors import CurlingError
from curling_fd.varlink.protocol import ErrorReply


class ExitCode(IntEnum):
    """The exit codes; they are interface and never change their meaning."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NO_DAEMON = 3
    NOT_PERMITTED = 4
    NO_SUCH_VM = 5
    REFUSED = 6
    PRECHECK = 7
    PEER = 8
    QEMU = 9
    CONFIG = 10
    CAPTURE = 11
    ARBITER = 12
    ENDED = 13
    INTERRUPTED = 130


MEANINGS = {
    ExitCode.OK: "done",
    ExitCode.FAILED: "anything not below; doctor: a check failed",
    ExitCode.USAGE: "the command line is wrong, or a confirmation is missing",
    ExitCode.NO_DAEMON: "no curlingd behind the socket",
    ExitCode.NOT_PERMITTED: "you lack the right",
    ExitCode.NO_SUCH_VM: "no VM of that name, or more than one",
    ExitCode.REFUSED: "not possible in the state the VM is in; nothing was changed",
    ExitCode.PRECHECK: "a check before protection failed; the guest was not touched",
    ExitCode.PEER: "the other host or the link to it",
    ExitCode.QEMU: "QEMU, or its monitor",
    ExitCode.CONFIG: "the configuration is wrong",
    ExitCode.CAPTURE: "no checkpoint could be taken; the guest runs on",
    ExitCode.ARBITER: "another host may run the VM, or nobody could tell",
    ExitCode.ENDED: "the guest or its protection ended meanwhile",
    ExitCode.INTERRUPTED: "Ctrl-C",
}

_CODES: dict[type[CurlingError], ExitCode] = {
    CurlingError: ExitCode.FAILED,
    ErrorReply: ExitCode.FAILED,
    errors.ConfigError: ExitCode.CONFIG,
    errors.CannotListen: ExitCode.CONFIG,
    errors.RequestRefused: ExitCode.REFUSED,
    errors.NoSuchVm: ExitCode.NO_SUCH_VM,
    errors.AmbiguousVm: ExitCode.NO_SUCH_VM,
    errors.NotPermitted: ExitCode.NOT_PERMITTED,
    errors.DaemonUnreachable: ExitCode.NO_DAEMON,
    errors.QmpError: ExitCode.QEMU,
    errors.RemoteProtocolError: ExitCode.FAILED,
    errors.StreamError: ExitCode.QEMU,
    errors.ColoError: ExitCode.QEMU,
    errors.FrameError: ExitCode.PEER,
    errors.VarlinkError: ExitCode.NO_DAEMON,
    errors.NbdError: ExitCode.QEMU,
    errors.NbdRequestFailed: ExitCode.QEMU,
    errors.PrecheckFailed: ExitCode.PRECHECK,
    errors.LinkError: ExitCode.PEER,
    errors.CaptureError: ExitCode.CAPTURE,
    errors.DiskError: ExitCode.CAPTURE,
    errors.OutputError: ExitCode.CAPTURE,
    errors.ArbiterError: ExitCode.ARBITER,
    errors.NetworkError: ExitCode.FAILED,
    errors.SessionEnd: ExitCode.ENDED,
}


def exit_code(error: CurlingError) -> ExitCode:
    """Return the code for `error`: that of its class, or of the nearest base that has one."""
    if isinstance(error, errors.PeerRefused):
        # The backup checks too: a precheck that failed there is one that failed.
        kind = getattr(errors, error.kind, None)
        if isinstance(kind, type) and issubclass(kind, errors.PrecheckFailed):
            return ExitCode.PRECHECK
    if isinstance(error, ErrorReply) and error.name == "org.varlink.service.PermissionDenied":
        return ExitCode.NOT_PERMITTED
    return next(_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)
