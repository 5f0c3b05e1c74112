"""What people read when something went wrong: for every error, what happened and then what to do about it.

This is the only place that makes such text. An error carries facts; the journal, the control interface and
curlingctl ask `sentence` for the words.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import singledispatch

from attrs import frozen

from curling_fd import errors
from curling_fd.units import format_duration, format_size
from curling_fd.varlink.protocol import SERVICE_INTERFACE, ErrorReply, split_method


@frozen
class Sentence:
    """`text` says what happened, `remedy` what the administrator should do. Each is one line."""

    text: str
    remedy: str


INTERNAL_ERROR = Sentence(
    "curlingd hit an error it did not expect and gave up this one request.",
    "Its cause is in the journal: 'journalctl -u curlingd -p err'. Please report it; curlingd itself goes "
    "on.",
)
"""For an exception that is none of ours: the client gets this, the journal the traceback."""


@singledispatch
def sentence(error: errors.CurlingError) -> Sentence:
    """Make the words for `error`, by its class."""
    said = _one_line(" ".join(str(argument) for argument in error.args))
    return Sentence(
        f"Curling failed{': ' + said if said else ''}.", "Look into the journal: 'journalctl -u curlingd'."
    )


# Configuration


@sentence.register
def _(error: errors.ConfigError) -> Sentence:
    where = f"{error.path}: {error.key}" if error.key else error.path
    if error.nearest:
        remedy = f"Did you mean {error.nearest}? docs/configuration.md explains every key."
    elif error.key:
        remedy = f"Correct {error.key} there; 'curlingctl check-config' checks without starting anything."
    else:
        remedy = f"Correct {error.path}; 'curlingctl check-config' checks without starting anything."
    return Sentence(f"{where}: {_clause(error.problem)}.", remedy)


# Requests


@sentence.register
def _(error: errors.RequestRefused) -> Sentence:
    return Sentence("The request cannot be done now.", "Look at the state of the VM: 'curlingctl show NAME'.")


@sentence.register
def _(error: errors.NoSuchVm) -> Sentence:
    ask = f"Did you mean {error.nearest}? " if error.nearest else ""
    return Sentence(
        f"This host knows no VM {error.name!r}.",
        f"{ask}'curlingctl list' shows those it knows; a new one needs a file in /etc/curling/vms.",
    )


@sentence.register
def _(error: errors.AmbiguousVm) -> Sentence:
    return Sentence(
        f"{error.name!r} is short for more than one VM: {_and(error.matches)}.",
        "Write more of the name.",
    )


@sentence.register
def _(error: errors.AlreadyProtected) -> Sentence:
    return Sentence(
        f"{error.name} is under protection already (its state is {error.state}).",
        f"Nothing to do; 'curlingctl watch {error.name}' shows its checkpoints.",
    )


@sentence.register
def _(error: errors.NotProtected) -> Sentence:
    return Sentence(
        f"{error.name} is not protected (its state is {error.state}).",
        f"Protect it first: 'curlingctl protect {error.name}' on the host where it runs.",
    )


@sentence.register
def _(error: errors.WrongRole) -> Sentence:
    has = "no role" if error.role == "none" else f"the role {error.role}"
    return Sentence(
        f"This host has {has} for {error.name}, and {error.verb!r} needs another.",
        f"Run 'curlingctl {error.verb} {error.name}' on the other host; 'curlingctl list' shows who is what.",
    )


@sentence.register
def _(error: errors.PrimaryAlive) -> Sentence:
    return Sentence(
        f"The primary of {error.name} is alive: it was heard {format_duration(error.silent_ms / 1000)} ago.",
        f"For a planned move run 'curlingctl switch {error.name}' on the primary, which loses nothing. If "
        f"you know that the primary is lost, 'curlingctl failover {error.name} --force'.",
    )


@sentence.register
def _(error: errors.NotPermitted) -> Sentence:
    return Sentence(
        f"User {error.uid} lacks the right for {error.verb!r}.",
        f"Be root, or have root add you to the group {error.group}: 'usermod -aG {error.group} USER', "
        "then log in again.",
    )


@sentence.register
def _(error: errors.DaemonUnreachable) -> Sentence:
    return Sentence(
        f"No curlingd answers at {error.path}: {_clause(error.problem)}.",
        "Start it with 'systemctl start curlingd', look at 'systemctl status curlingd'; for another socket "
        "give --socket.",
    )


# QEMU


@sentence.register
def _(error: errors.QmpError) -> Sentence:
    return Sentence("QEMU's monitor failed.", "Look into QEMU's own log and into 'journalctl -u curlingd'.")


@sentence.register
def _(error: errors.QmpUnreachable) -> Sentence:
    return Sentence(
        f"QEMU's monitor at {error.path} cannot be reached: {_clause(error.problem)}.",
        f"See that the VM runs, has '-qmp unix:{error.path},server=on,wait=off', and that curlingd may open "
        "the socket.",
    )


@sentence.register
def _(error: errors.QmpBusy) -> Sentence:
    return Sentence(
        f"Another client holds QEMU's monitor at {error.path}: it took the connection and sent no greeting.",
        "Give Curling a monitor of its own: add a second '-qmp unix:PATH,server=on,wait=off' to the VM and "
        "name that PATH as qmp in the VM's file.",
    )


@sentence.register
def _(error: errors.QmpNotQmp) -> Sentence:
    return Sentence(
        f"What answers at {error.path} does not speak QMP; it began with {error.got!r}.",
        "Correct qmp in the VM's file: it is the path of the socket given to QEMU with -qmp, not of a "
        "serial console or of the human monitor.",
    )


@sentence.register
def _(error: errors.QmpCommandFailed) -> Sentence:
    return Sentence(
        f"QEMU refused {error.command}: {_clause(error.description)} ({error.kind}).",
        "If the reason is not clear from QEMU's words, look into 'journalctl -u curlingd' for what went "
        "before.",
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
def _(error: errors.QmpTimeout) -> Sentence:
    return Sentence(
        f"QEMU did not answer {error.command} within {format_duration(error.seconds)}.",
        "See whether QEMU hangs, for one on storage that does not answer ('dmesg', 'top'), then try again.",
    )


# Peers that break the rules


@sentence.register
def _(error: errors.RemoteProtocolError) -> Sentence:
    return Sentence(
        "The other side broke the rules of the protocol.",
        "See that both run the versions Curling supports; report it.",
    )


@sentence.register
def _(error: errors.StreamError) -> Sentence:
    return Sentence(
        f"QEMU's migration stream cannot be read at byte {error.offset}: {_clause(error.problem)}.",
        "See whether this QEMU version is one Curling supports ('curlingctl doctor'), and report it with "
        "that version.",
    )


@sentence.register
def _(error: errors.ColoError) -> Sentence:
    return Sentence(
        f"QEMU broke the checkpoint protocol: {_clause(error.problem)}.",
        'Protect the VM again, with engine = "snapshot" in its file if it happens again; report it with '
        "the QEMU version.",
    )


@sentence.register
def _(error: errors.FrameError) -> Sentence:
    return Sentence(
        f"What came over the link is not from a curlingd, or was damaged: {_clause(error.problem)}.",
        "See that peer names the other host's curlingd and nothing stands between that changes bytes; run "
        "the same version on both hosts.",
    )


@sentence.register
def _(error: errors.VarlinkError) -> Sentence:
    return Sentence(
        f"The other end of the control socket does not speak Varlink: {_clause(error.problem)}.",
        "See that the socket is curlingd's (control_socket in curlingd.toml, --socket of curlingctl).",
    )


# Prechecks


@sentence.register
def _(error: errors.PrecheckFailed) -> Sentence:
    return Sentence(
        "A check before protection failed; the guest was not touched.", "Run 'curlingctl doctor'."
    )


@sentence.register
def _(error: errors.MigrationBlocked) -> Sentence:
    return Sentence(
        f"QEMU says this VM cannot be migrated: {'; '.join(map(_clause, error.reasons))}.",
        "Take the device or feature named there out of the VM, then protect it again.",
    )


@sentence.register
def _(error: errors.WritableDisk) -> Sentence:
    disks = "disk" if len(error.devices) == 1 else "disks"
    them = "it" if len(error.devices) == 1 else "them"
    return Sentence(
        f"The guest can write to the {disks} {_and(error.devices)}, and Curling does not replicate disks.",
        f"Until Curling replicates disks, list {them} under shared_disks (storage both hosts see) or "
        f"scratch_disks (content that may be lost) in the VM's file, or make {them} read-only.",
    )


@sentence.register
def _(error: errors.MachineMismatch) -> Sentence:
    return Sentence(
        f"The two hosts differ in {error.what}: {error.primary} on the primary, {error.backup} on the "
        "backup.",
        "Make them the same: name a QEMU of the right version as standby.qemu in the VM's file on the "
        "backup, or start the VM with a versioned machine type both have.",
    )


@sentence.register
def _(error: errors.NotEnoughMemory) -> Sentence:
    return Sentence(
        f"The backup has too little memory: {format_size(error.needed)} needed, "
        f"{format_size(error.available)} available.",
        "Free or add memory there, or protect this VM to another host.",
    )


@sentence.register
def _(error: errors.StandbyFailed) -> Sentence:
    lines = [line for line in error.stderr.splitlines() if line.strip()]
    printed = f"; it printed: {_clause(lines[-1])}" if lines else ""
    return Sentence(
        f"The standby QEMU on the backup failed: {_clause(error.problem)}{printed}.",
        "See that the backup has what the VM's command line names (files, bridges, CPU features), or map "
        "it with standby.replace and standby.extra_args in the VM's file there.",
    )


@sentence.register
def _(error: errors.CannotDerive) -> Sentence:
    return Sentence(
        f"No standby can be made from the VM's command line because of {error.option}: {_clause(error.why)}.",
        "Take the option out of the VM, or change it for the backup with standby.replace and "
        "standby.extra_args in the VM's file there.",
    )


@sentence.register
def _(error: errors.EngineUnavailable) -> Sentence:
    return Sentence(
        f"The engine {error.engine} cannot work with this VM: {_clause(error.why)}.",
        'Set engine = "auto" in the VM\'s file to let Curling pick one that can.',
    )


@sentence.register
def _(error: errors.GuestNotRunning) -> Sentence:
    return Sentence(
        f"The guest does not run: QEMU says it is {error.status}.",
        "Start or resume the guest, then protect it.",
    )


@sentence.register
def _(error: errors.InsecurePeer) -> Sentence:
    return Sentence(
        f"The link to {error.address} would cross a network without encryption.",
        "Guest memory would be readable on the way. Use a tunnel that ends on loopback, or accept it on a "
        "network you trust with insecure = true in curlingd.toml on both hosts.",
    )


# The link


@sentence.register
def _(error: errors.LinkError) -> Sentence:
    return Sentence(
        "The link between the two hosts failed.", "Look into 'journalctl -u curlingd' on both hosts."
    )


@sentence.register
def _(error: errors.PeerUnreachable) -> Sentence:
    return Sentence(
        f"The other host's curlingd at {error.address} cannot be reached: {_clause(error.problem)}.",
        "See that curlingd runs there, listens on that address (listen in its curlingd.toml), and no "
        "firewall stands between.",
    )


@sentence.register
def _(error: errors.PeerIncompatible) -> Sentence:
    older = "this host" if error.ours < error.theirs else "the other host"
    return Sentence(
        f"The two curlingd speak different versions of the link: {error.ours} here, {error.theirs} there.",
        f"Upgrade Curling on {older}.",
    )


@sentence.register
def _(error: errors.PeerRefused) -> Sentence:
    return Sentence(
        f"The other host refused ({error.kind}): {_clause(error.text)}.",
        error.remedy or "Look into 'journalctl -u curlingd' on the other host.",
    )


@sentence.register
def _(error: errors.LinkLost) -> Sentence:
    return Sentence(
        f"The link to the other host was lost: {_clause(error.why)}.",
        "See whether the other host and the network between are alive. The guest runs on; 'curlingctl "
        "show' says when it is protected again.",
    )


@sentence.register
def _(error: errors.StaleGeneration) -> Sentence:
    return Sentence(
        f"The VM has been taken over: its generation is {error.theirs} on the other host, {error.ours} here.",
        "Leave it stopped here: it runs on the other host. To bring it back, protect it there and then run "
        "'curlingctl switch'.",
    )


# Checkpoints


@sentence.register
def _(error: errors.CaptureError) -> Sentence:
    return Sentence(
        "A checkpoint could not be taken; the guest runs on, unprotected.",
        "Look into 'journalctl -u curlingd'.",
    )


@sentence.register
def _(error: errors.CheckpointTooLarge) -> Sentence:
    return Sentence(
        f"A checkpoint needed more than the {format_size(error.limit)} it may have.",
        "The guest writes much memory between checkpoints: raise max_checkpoint in the VM's file, or lower "
        "longest_epoch.",
    )


@sentence.register
def _(error: errors.CheckpointTimeout) -> Sentence:
    return Sentence(
        f"A checkpoint took more than {format_duration(error.seconds)}, waiting for {error.waiting_for}.",
        "The guest was let go and is unprotected. If it happens again, see what holds that up ('curlingctl "
        "doctor', load, disks).",
    )


@sentence.register
def _(error: errors.EngineFailed) -> Sentence:
    return Sentence(
        f"The engine {error.engine} failed: {_clause(error.why)}.",
        "With engine = \"auto\" another is tried by itself; 'curlingctl show' says which is in use and why.",
    )


# Who may run


@sentence.register
def _(error: errors.ArbiterError) -> Sentence:
    return Sentence(
        "Who may run the VM could not be settled.",
        "See on both hosts which one runs it before anything else.",
    )


@sentence.register
def _(error: errors.ArbiterLost) -> Sentence:
    return Sentence(
        f"{error.winner} may run the VM, not this host: it holds generation {error.generation}.",
        f"Leave it stopped here. To bring it back, protect it on {error.winner} and then run 'curlingctl "
        "switch' there.",
    )


@sentence.register
def _(error: errors.ArbiterUnavailable) -> Sentence:
    return Sentence(
        f"The arbiter did not answer, so nobody may take the VM over: {_clause(error.why)}.",
        "Make the arbiter reachable (arbiter_directory: is the shared storage mounted and writable?).",
    )


# Protection that ended by itself


@sentence.register
def _(error: errors.SessionEnd) -> Sentence:
    return Sentence("Protection has ended.", "'curlingctl events' says what happened.")


@sentence.register
def _(error: errors.GuestEnded) -> Sentence:
    return Sentence(
        f"Protection has ended because the guest has {_clause(error.how)}.",
        "Nothing was failed over. Start the VM and protect it again when you want it back.",
    )


@sentence.register
def _(error: errors.QemuDied) -> Sentence:
    return Sentence(
        "QEMU on the primary has died; the backup has the VM's last committed checkpoint.",
        "Run 'curlingctl failover' on the backup to continue the VM from there, and see in QEMU's log why "
        "it died.",
    )


@sentence.register
def _(error: errors.Unprotected) -> Sentence:
    return Sentence(
        f"Protection was ended on request: {_clause(error.why)}.",
        "'curlingctl protect' starts it again.",
    )


# Errors of a service that this version has no class for


@sentence.register
def _(error: ErrorReply) -> Sentence:
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


def _and(names: Iterable[str]) -> str:
    *most, last = list(names) or ["nothing"]
    return f"{', '.join(most)} and {last}" if most else last


def _clause(words: str) -> str:
    """Make foreign words fit inside a sentence: one line, no full stop of their own."""
    return _one_line(words).rstrip(".") or "no reason given"


def _one_line(words: str) -> str:
    return " ".join(words.split())
