"""What people read when something went wrong: for every error, what happened and then what to do about it.

This is the only place that makes such text. An error carries facts; the journal, the control interface and
curlingctl ask `sentence` for the words. Most come from the table `_WORDS`, whose {names} are the facts as
people write them; an error whose words depend on its facts has a function, registered further down.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from functools import singledispatch
from typing import Any

from attrs import frozen

from curling_fd import errors
from curling_fd.disk import words as disk_words
from curling_fd.units import format_duration, format_size
from curling_fd.varlink.protocol import SERVICE_INTERFACE, ErrorReply, split_method


@frozen
class Sentence:
    """`text` says what happened, `remedy` what the administrator should do. Each is one line."""

    text: str
    remedy: str


INTERNAL_ERROR = Sentence(
    "curlingd hit an error it did not expect and gave up this one request.",
    "Its cause is in the journal: 'journalctl -u curlingd'. Please report it; curlingd itself goes on.",
)
"""For an exception that is none of ours: the client gets this, the journal the traceback."""

_WORDS: dict[type[errors.CurlingError], tuple[str, str]] = {
    **disk_words.WORDS,
    errors.CannotListen: (
        "This curlingd cannot listen on {address} for other hosts: {problem}.",
        "End the program that has the port ('ss -ltnp' shows it), or correct listen in curlingd.toml, and "
        "peer on the other host. Under systemd it is tried again every 2 s.",
    ),
    # Requests
    errors.RequestRefused: (
        "The request cannot be done now.",
        "Look at the state of the VM: 'curlingctl show NAME'.",
    ),
    errors.AmbiguousVm: (
        "{name!r} is short for more than one VM: {matches}.",
        "Write more of the name.",
    ),
    errors.AlreadyProtected: (
        "{name} is under protection already (its state is {state}).",
        "Nothing to do; 'curlingctl watch {name}' shows its checkpoints.",
    ),
    errors.NotProtected: (
        "{name} is not protected (its state is {state}).",
        "Protect it first: 'curlingctl protect {name}' on the host where it runs.",
    ),
    errors.PrimaryAlive: (
        "The primary of {name} is alive: it was heard {silent_ms} ago.",
        "For a planned move run 'curlingctl switch {name}' on the primary, which loses nothing. If you "
        "know that the primary is lost, 'curlingctl failover {name} --force'.",
    ),
    errors.NotPermitted: (
        "User {uid} lacks the right for {verb!r}.",
        "Be root, or have root add you to the group {group}: 'usermod -aG {group} USER', then log in again.",
    ),
    errors.DaemonUnreachable: (
        "No curlingd answers at {path}: {problem}.",
        "Start it with 'systemctl start curlingd', look at 'systemctl status curlingd'; for another socket "
        "give --socket.",
    ),
    # QEMU
    errors.QmpError: (
        "QEMU's monitor failed.",
        "Look into QEMU's own log and into 'journalctl -u curlingd'.",
    ),
    errors.QmpUnreachable: (
        "QEMU's monitor at {path} cannot be reached: {problem}.",
        "See that the VM runs, has '-qmp unix:{path},server=on,wait=off', and that curlingd may open the "
        "socket.",
    ),
    errors.QmpBusy: (
        "Another client holds QEMU's monitor at {path}: it took the connection and sent no greeting.",
        "Give Curling a monitor of its own: add a second '-qmp unix:PATH,server=on,wait=off' to the VM and "
        "name that PATH as qmp in the VM's file.",
    ),
    errors.QmpNotQmp: (
        "What answers at {path} does not speak QMP; it began with {got!r}.",
        "Correct qmp in the VM's file: it is the path of the socket given to QEMU with -qmp, not of a serial "
        "console or of the human monitor.",
    ),
    errors.QmpCommandFailed: (
        "QEMU refused {command}: {description} ({kind}).",
        "If the reason is not clear from QEMU's words, see in 'journalctl -u curlingd' what went before.",
    ),
    errors.QmpTimeout: (
        "QEMU did not answer {command} within {seconds}.",
        "See whether QEMU hangs, for one on storage that does not answer ('dmesg', 'top'), then try again.",
    ),
    # Peers that break the rules
    errors.RemoteProtocolError: (
        "The other side broke the rules of the protocol.",
        "See that both sides run versions that Curling supports, and report it.",
    ),
    errors.StreamError: (
        "QEMU's migration stream cannot be read at byte {offset}: {problem}.",
        "See whether this QEMU version is one that Curling supports ('curlingctl doctor'), and report it.",
    ),
    errors.ColoError: (
        "QEMU broke the checkpoint protocol: {problem}.",
        'Protect the VM again; if it happens again set engine = "snapshot" in its file, and report it.',
    ),
    errors.FrameError: (
        "What came over the link is not from a curlingd, or was damaged: {problem}.",
        "See that peer names the other host's curlingd, that nothing between them changes bytes, and that "
        "both hosts run the same version.",
    ),
    errors.VarlinkError: (
        "The other end of the control socket does not speak Varlink: {problem}.",
        "See that the socket is curlingd's (control_socket in curlingd.toml, --socket of curlingctl).",
    ),
    # Prechecks
    errors.PrecheckFailed: (
        "A check before protection failed; the guest was not touched.",
        "Run 'curlingctl doctor'.",
    ),
    errors.MachineMismatch: (
        "The two hosts differ in {what}: {primary} on the primary, {backup} on the backup.",
        "Make them the same: name a QEMU of the right version as standby.qemu in the VM's file on the "
        "backup, or start the VM with a versioned machine type that both have.",
    ),
    errors.HostsDisagree: (
        "The configurations of the two hosts do not fit together: {problem}.",
        "Make the VM's files and curlingd.toml of both hosts agree there, restart curlingd, then try again.",
    ),
    errors.NotEnoughMemory: (
        "The backup has too little memory: {needed} needed, {available} available.",
        "Free or add memory there, or protect this VM to another host.",
    ),
    errors.CannotDerive: (
        "No standby can be made from the VM's command line because of {option}: {why}.",
        "Take the option out of the VM, or change it for the backup with standby.replace and "
        "standby.extra_args in the VM's file there.",
    ),
    errors.EngineUnavailable: (
        "The engine {engine} cannot work with this VM: {why}.",
        'Set engine = "auto" in the VM\'s file to let Curling pick one that can.',
    ),
    errors.GuestNotRunning: (
        "The guest does not run: QEMU says it is {status}.",
        "Start or resume the guest, then protect it.",
    ),
    errors.InsecurePeer: (
        "The link to {address} would cross a network without encryption.",
        "Guest memory would be readable on the way. Use a tunnel that ends on loopback, or accept it on a "
        "network you trust with insecure = true in curlingd.toml on both hosts.",
    ),
    # The link
    errors.LinkError: (
        "The link between the two hosts failed.",
        "Look into 'journalctl -u curlingd' on both hosts.",
    ),
    errors.PeerUnreachable: (
        "The other host's curlingd at {address} cannot be reached: {problem}.",
        "See that curlingd runs there, that it listens on that address (listen in its curlingd.toml), and "
        "that no firewall stands between.",
    ),
    errors.LinkLost: (
        "The link to the other host was lost: {why}.",
        "See whether the other host and the network between are alive. The guest runs on; 'curlingctl "
        "show' says when it is protected again.",
    ),
    errors.LinkClosed: (
        "The link to the other host was closed there: {why}.",
        "See whether curlingd runs on the other host. The guest runs on; 'curlingctl show' says when it is "
        "protected again.",
    ),
    errors.StaleGeneration: (
        "The VM has been taken over: its generation is {theirs} on the other host, {ours} here.",
        "Leave it stopped here: it runs on the other host. To bring it back, protect it there and then run "
        "'curlingctl switch'.",
    ),
    # Checkpoints
    errors.CaptureError: (
        "A checkpoint could not be taken; the guest runs on, unprotected.",
        "Look into 'journalctl -u curlingd'.",
    ),
    errors.CheckpointTooLarge: (
        "A checkpoint needed more than the {limit} it may have.",
        "The guest writes much memory between checkpoints: raise max_checkpoint in the VM's file, or lower "
        "longest_epoch.",
    ),
    errors.CheckpointTimeout: (
        "A checkpoint took more than {seconds}, waiting for {waiting_for}.",
        "The guest was let go and is unprotected. If it happens again, see what holds that up ('curlingctl "
        "doctor', load, disks).",
    ),
    errors.EngineFailed: (
        "The engine {engine} failed: {why}.",
        "With engine = \"auto\" another is tried by itself; 'curlingctl show' says which is in use and why.",
    ),
    # Output
    errors.CannotHold: (
        "The packets of {nic} cannot be held back until they are safe: {why}.",
        'Give the VM a network card on a tap (with vhost or without), or set output = "none" in its file: '
        "then clients may see what a failover undoes.",
    ),
    errors.OutputError: (
        "The guest's packets at {what} could not be held or let out: {why}.",
        "Look at {what} ('ip -d link', 'tc -s qdisc'); once it is as it should be, the VM is protected again "
        "by itself.",
    ),
    errors.ModuleMissing: (
        "The guest's packets at {what} cannot be held: the kernel has no {module} ({why}).",
        "Install the modules of the running kernel (Debian: linux-image-amd64; Ubuntu: linux-modules-extra "
        "of its version) and see that 'modprobe {module}' works; or have QEMU hold them: output = "
        '"filter".',
    ),
    errors.PortTaken: (
        "The guest's packets at {what} cannot be held: another program has put the qdisc {qdisc} on it, "
        "{why}.",
        "'tc filter show dev {what} ingress' tells whose it is: libvirt makes one for <bandwidth>, Cilium "
        "for its programs. Take it out there, then 'tc qdisc del dev {what} {qdisc}'; or have QEMU hold "
        'them: output = "filter".',
    ),
    # Who may run
    errors.ArbiterError: (
        "Who may run the VM could not be settled.",
        "See on both hosts which one runs it before anything else.",
    ),
    errors.ArbiterLost: (
        "{winner} may run the VM, not this host: it holds generation {generation}.",
        "Leave it stopped here. To bring it back, protect it on {winner} and then run 'curlingctl switch' "
        "there.",
    ),
    errors.ArbiterUnavailable: (
        "The arbiter gives nobody the right to take the VM over: {why}.",
        "Make the arbiter reachable (arbiter_directory: is the shared storage mounted and writable?), or "
        "decide yourself with 'curlingctl failover' when the other host is surely down.",
    ),
    # The network of a VM that comes to this host
    errors.NetworkError: (
        "The network of this host is not as it was to be.",
        "Look into 'journalctl -u curlingd'.",
    ),
    errors.AddressConflict: (
        "{address} is in use on the network behind {interface}: {mac} has it.",
        "See which machine has that MAC: the VM's old host, if it is not dead, or another one with a wrong "
        'address. Take the address away there; or set duplicate_address_detection = "0s" in [network] of the '
        "VM's file to take it all the same.",
    ),
    # Protection that ended by itself
    errors.SessionEnd: (
        "Protection has ended.",
        "'curlingctl events' says what happened.",
    ),
    errors.GuestEnded: (
        "Protection has ended: {how}.",
        "Nothing was failed over. Start the VM and protect it again when you want it back.",
    ),
    errors.QemuDied: (
        "QEMU on the primary has died; the backup has the VM's last committed checkpoint.",
        "See with 'curlingctl list' on the backup whether it has taken the VM over; if not, run 'curlingctl "
        "failover' there. QEMU's log may say why it died.",
    ),
    errors.Unprotected: (
        "Protection was ended on request: {why}.",
        "'curlingctl protect' starts it again.",
    ),
}

_UNITS: dict[str, Callable[[Any], str]] = {
    "silent_ms": lambda value: format_duration(value / 1000),
    "seconds": format_duration,
    "needed": format_size,
    "available": format_size,
    "limit": format_size,
    "verb": lambda value: value.lower(),
}
"""How facts of these names are written; others by their type."""


@singledispatch
def sentence(error: errors.CurlingError) -> Sentence:
    """Make the words for `error`, by its class or the nearest base that has some."""
    for kind in type(error).__mro__:
        if kind in _WORDS:
            shown = {name: _shown(name, value) for name, value in errors.facts(error).items()}
            return Sentence(*(words.format(**shown) for words in _WORDS[kind]))
    said = _clause(" ".join(map(str, error.args))) if error.args else ""
    return Sentence(
        f"Curling failed{': ' + said if said else ''}.", "Look into the journal: 'journalctl -u curlingd'."
    )


def has_words(kind: type[errors.CurlingError]) -> bool:
    """Say whether `kind` has words of its own, so that a test can ask it of all."""
    return kind in _WORDS or kind in sentence.registry


for _kind, _words in disk_words.FORMED.items():
    sentence.register(_kind, lambda error, words=_words: Sentence(*words(error)))


@sentence.register
def _(error: errors.ConfigError) -> Sentence:
    where = f"{error.path}: {error.key}" if error.key else error.path
    if error.nearest:
        remedy = f"Did you mean {error.nearest}? docs/configuration.md explains every key."
    else:
        what = f"{error.key} there" if error.key else error.path
        remedy = f"Correct {what}; 'curlingctl check-config' checks without starting anything."
    return Sentence(f"{where}: {_clause(error.problem)}.", remedy)


@sentence.register
def _(error: errors.NoSuchVm) -> Sentence:
    ask = f"Did you mean {error.nearest}? " if error.nearest else ""
    return Sentence(
        f"This host knows no VM {error.name!r}.",
        f"{ask}'curlingctl list' shows those it knows; a new one needs a file in /etc/curling/vms.",
    )


_HOST_FOR = {
    "protect": "the host where the VM runs",
    "unprotect": "the VM's primary",
    "failover": "the VM's backup",
    "switch": "the VM's primary",
    "pause": "the VM's primary",
    "resume": "the VM's primary",
}


@sentence.register
def _(error: errors.WrongRole) -> Sentence:
    has = "has no role" if error.role == "none" else f"is {error.role}"
    where = _HOST_FOR.get(error.verb)
    if where is None:
        return Sentence(
            f"This host {has} for {error.name}, and that does not go with {error.verb}.",
            "See with 'curlingctl list' on both hosts which one runs the VM, and protect it from there.",
        )
    return Sentence(
        f"{error.verb!r} cannot be done here: this host {has} for {error.name}.",
        f"Run 'curlingctl {error.verb} {error.name}' on {where}; 'curlingctl list' shows which that is.",
    )


@sentence.register
def _(error: errors.QmpDisconnected) -> Sentence:
    waiting = f" while it was to answer {error.command}" if error.command else ""
    return Sentence(
        f"QEMU went away{waiting}.",
        "See in QEMU's log whether the guest was shut down or QEMU crashed; once it runs again, protect it "
        "again.",
    )


@sentence.register
def _(error: errors.MigrationBlocked) -> Sentence:
    return Sentence(
        f"QEMU says this VM cannot be migrated: {'; '.join(map(_clause, error.reasons))}.",
        "Take the device or feature named there out of the VM, then protect it again.",
    )


@sentence.register
def _(error: errors.WritableDisk) -> Sentence:
    disks, them, their = ("disk", "it", "its") if len(error.devices) == 1 else ("disks", "them", "their")
    return Sentence(
        f"The guest can write to the shared {disks} {_and(error.devices)}: after a failover {their} content "
        "would be newer than the guest's memory, and a file system there be damaged.",
        f"Give the VM a disk of its own on each host and take {them} out of shared_disks in the VM's file, "
        f"so that Curling replicates {them}; or make {them} read-only; or list {them} under scratch_disks, "
        "if the content may be lost.",
    )


@sentence.register
def _(error: errors.StandbyFailed) -> Sentence:
    lines = [_clause(line) for line in error.stderr.splitlines() if line.strip()]
    printed = f"; it printed: {' / '.join(lines[-3:])}" if lines else ""
    return Sentence(
        f"The standby QEMU on the backup failed: {_clause(error.problem)}{printed}.",
        "See that the backup has what the VM's command line names (files, bridges, CPU features), or map "
        "it with standby.replace and standby.extra_args in the VM's file there.",
    )


@sentence.register
def _(error: errors.PeerIncompatible) -> Sentence:
    older = "this host" if error.ours < error.theirs else "the other host"
    return Sentence(
        f"The two curlingd speak different versions of the link: {error.ours} here, {error.theirs} there.",
        f"Upgrade Curling on {older}.",
    )


_ABOUT_NETWORK = {
    errno.EPERM: "Run curlingd as its unit does, with CAP_NET_ADMIN in the name space of the interface.",
    errno.EEXIST: "Something like it is there already: see whose it is with 'ip -d link', 'ip address', 'ip "
    "route' and 'tc qdisc', and remove it if nobody needs it.",
    errno.ENODEV: "See with 'ip link' whether the interface is there or has another name, and correct the "
    "VM's file.",
    errno.EBUSY: "Another program uses it: see with 'ip -d link' what it belongs to, and take it out there.",
}


@sentence.register
def _(error: errors.NetlinkError) -> Sentence:
    name = errno.errorcode.get(error.errno, "unknown")
    return Sentence(
        f"The kernel refused {error.what}: {_clause(error.words)} ({name}, error {error.errno}).",
        _ABOUT_NETWORK.get(error.errno, "The kernel's log may say more: 'journalctl -k'."),
    )


@sentence.register
def _(error: errors.NetworkConflict) -> Sentence:
    text = f"On this host {_one_line(error.what)} cannot be as the VM needs it: {_clause(error.problem)}."
    return Sentence(text, _one_line(error.remedy))


@sentence.register
def _(error: errors.PeerRefused) -> Sentence:
    return Sentence(
        f"The other host refused ({error.kind}): {_clause(error.text)}.",
        _one_line(error.remedy) or "Look into 'journalctl -u curlingd' on the other host.",
    )


@sentence.register
def _(error: ErrorReply) -> Sentence:
    """An error that this version has no class for speaks for itself, if it can."""
    text, remedy = error.parameters.get("text"), error.parameters.get("remedy")
    if isinstance(text, str) and isinstance(remedy, str) and text:
        return Sentence(_one_line(text), _one_line(remedy) or "Look into 'journalctl -u curlingd'.")
    interface, name = split_method(error.name)
    if interface != SERVICE_INTERFACE:
        return Sentence(
            f"The service answered with the error {_one_line(error.name)}.", "See that it is curlingd."
        )
    what = _one_line(str(next(iter(error.parameters.values()), "")))
    said = {
        "InterfaceNotFound": f"The service at the socket has no interface {what}.",
        "MethodNotFound": f"This curlingd has no method {what}.",
        "MethodNotImplemented": f"This curlingd does not do {what}.",
        "InvalidParameter": f"This curlingd does not take the parameter {what} as it was given.",
        "ExpectedMore": "This curlingd gives that answer only as a stream.",
        "PermissionDenied": "The service does not permit that.",
    }.get(name, f"The service answered with the error {name}.")
    return Sentence(
        said,
        "See that curlingctl and curlingd are of the same version, and restart curlingd after an upgrade.",
    )


def _shown(name: str, value: Any) -> str:
    if name in _UNITS:
        return _UNITS[name](value)
    return _and(value) if isinstance(value, tuple) else _clause(str(value))


def _and(names: Iterable[str]) -> str:
    *most, last = list(names) or ["nothing"]
    return f"{', '.join(most)} and {last}" if most else last


def _clause(words: str) -> str:
    """Make foreign words fit inside a sentence: one line, no full stop of their own."""
    return _one_line(words).rstrip(".") or "no reason given"


def _one_line(words: str) -> str:
    return " ".join(words.split())
