"""The three layers: imports point down or sideways, and the protocol layer does no input and output.

    protocol   bytes, text and tables; nothing that could wait, open or ask
    system     descriptors, memory, processes, sockets, clocks
    service    supervision, configuration, programs

Whoever adds a module adds it to this table.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "curling_fd"

PROTOCOL = """
curling_fd
curling_fd.error_roots
curling_fd.errors
curling_fd.sentences
curling_fd.units
curling_fd.capture
curling_fd.capture.colo
curling_fd.capture.probe
curling_fd.disk
curling_fd.disk.bitmap
curling_fd.disk.compare
curling_fd.disk.errors
curling_fd.disk.inventory
curling_fd.disk.log
curling_fd.disk.marker
curling_fd.disk.qcow2_header
curling_fd.disk.spec
curling_fd.disk.steps
curling_fd.disk.watch
curling_fd.disk.words
curling_fd.failover
curling_fd.failover.states
curling_fd.journald
curling_fd.journald.entry
curling_fd.journald.messages
curling_fd.link
curling_fd.link.frames
curling_fd.nbd
curling_fd.nbd.client
curling_fd.nbd.protocol
curling_fd.nbd.server
curling_fd.netlink
curling_fd.netlink.wire
curling_fd.network
curling_fd.network.bpf
curling_fd.network.learn
curling_fd.network.packets
curling_fd.network.plan
curling_fd.network.port
curling_fd.network.words
curling_fd.output
curling_fd.output.nics
curling_fd.qmp
curling_fd.qmp.protocol
curling_fd.replica
curling_fd.standby
curling_fd.standby.cmdline
curling_fd.standby.hostside
curling_fd.standby.keyval
curling_fd.standby.memory
curling_fd.standby.options
curling_fd.standby.paths
curling_fd.varlink
curling_fd.varlink.failures
curling_fd.varlink.idl
curling_fd.varlink.introspection
curling_fd.varlink.protocol
curling_fd.vmstate
curling_fd.vmstate.configuration
curling_fd.vmstate.cursor
curling_fd.vmstate.image
curling_fd.vmstate.ram
curling_fd.vmstate.records
curling_fd.vmstate.restore
curling_fd.vmstate.scanner
"""

SYSTEM = """
curling_fd.capture.choice
curling_fd.capture.engine
curling_fd.capture.guarding
curling_fd.capture.incremental
curling_fd.capture.intake
curling_fd.capture.limit
curling_fd.capture.reader
curling_fd.capture.recover
curling_fd.capture.settings
curling_fd.capture.tcg
curling_fd.capture.whole
curling_fd.disk.copies
curling_fd.disk.copy
curling_fd.disk.endpoint
curling_fd.disk.epoch
curling_fd.disk.holdings
curling_fd.disk.image
curling_fd.disk.intake
curling_fd.disk.locks
curling_fd.disk.markers
curling_fd.disk.memory
curling_fd.disk.nbd_client
curling_fd.disk.precheck
curling_fd.disk.qcow2
curling_fd.failover.arbiter
curling_fd.journald.sender
curling_fd.link.pulse
curling_fd.link.transport
curling_fd.netlink.links
curling_fd.netlink.socket
curling_fd.netlink.traffic
curling_fd.network.addresses
curling_fd.network.announce
curling_fd.network.conflict
curling_fd.network.failover
curling_fd.network.fdb
curling_fd.network.inject
curling_fd.network.kernel
curling_fd.network.packet_socket
curling_fd.network.ports
curling_fd.network.snoop
curling_fd.network.steps
curling_fd.network.taps
curling_fd.output.filter
curling_fd.output.hold
curling_fd.output.placement
curling_fd.output.plug
curling_fd.output.taps
curling_fd.output.watch
curling_fd.qmp.client
curling_fd.replica.image
curling_fd.standby.process
curling_fd.standby.program
curling_fd.system
curling_fd.system.buffers
curling_fd.system.files
curling_fd.system.guard
curling_fd.system.guard_main
curling_fd.system.holes
curling_fd.system.memory
curling_fd.system.nursery
curling_fd.system.platform
curling_fd.system.privileges
curling_fd.system.process
curling_fd.system.systemd
curling_fd.system.threads
curling_fd.system.userfault
curling_fd.varlink.client
curling_fd.varlink.listener
curling_fd.varlink.peer
curling_fd.varlink.server
"""

SERVICE = """
curling_fd.ctl
curling_fd.ctl.actions
curling_fd.ctl.actions.doctor
curling_fd.ctl.actions.local
curling_fd.ctl.actions.protection
curling_fd.ctl.actions.takeover
curling_fd.ctl.actions.vms
curling_fd.ctl.actions.watching
curling_fd.ctl.confirm
curling_fd.ctl.context
curling_fd.ctl.exit_codes
curling_fd.ctl.failure
curling_fd.ctl.live
curling_fd.ctl.main
curling_fd.ctl.parser
curling_fd.ctl.render
curling_fd.ctl.words
curling_fd.service
curling_fd.service.api
curling_fd.service.backup
curling_fd.service.compare
curling_fd.service.config
curling_fd.service.config_keys
curling_fd.service.config_network
curling_fd.service.daemon
curling_fd.service.copies
curling_fd.service.disk_shipper
curling_fd.service.disks
curling_fd.service.doctor
curling_fd.service.encounter
curling_fd.service.examine
curling_fd.service.facts
curling_fd.service.farewell
curling_fd.service.fence
curling_fd.service.follower
curling_fd.service.flights
curling_fd.service.gate
curling_fd.service.greeting
curling_fd.service.handover
curling_fd.service.host
curling_fd.service.hostcheck
curling_fd.service.interface
curling_fd.service.journal
curling_fd.service.last_words
curling_fd.service.mirror
curling_fd.service.network
curling_fd.service.options
curling_fd.service.output
curling_fd.service.pace
curling_fd.service.pass_report
curling_fd.service.pass_shipper
curling_fd.service.preparing
curling_fd.service.primary
curling_fd.service.progress
curling_fd.service.protector
curling_fd.service.record
curling_fd.service.restart
curling_fd.service.standby
curling_fd.service.statistics
curling_fd.service.stops
curling_fd.service.store
curling_fd.service.takeover
curling_fd.service.vm
"""

ORDER = ("protocol", "system", "service")
LAYER = {
    module: layer
    for layer, modules in zip(ORDER, (PROTOCOL, SYSTEM, SERVICE), strict=True)
    for module in modules.split()
}

#: What the protocol layer may use beside itself: none of these can wait, open or ask for anything. Of `sys`
#: it is the byte order, of `errno` the names of numbers.
PURE = frozenset(
    {
        "__future__",
        "array",
        "attrs",
        "collections",
        "contextlib",
        "dataclasses",
        "difflib",
        "enum",
        "errno",
        "fractions",
        "functools",
        "ipaddress",
        "itertools",
        "json",
        "math",
        "operator",
        "re",
        "string",
        "struct",
        "sys",
        "textwrap",
        "types",
        "typing",
        "xxhash",
        "zlib",
    }
)


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(source: str) -> set[str]:
    """The modules that `source` imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import says the whole name"
            assert node.module is not None
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules or {node.module}
    return found


def imported_by(module: str) -> set[str]:
    return imports(MODULES[module].read_text("utf-8"))


def is_ours(module: str) -> bool:
    return module.split(".")[0] == PACKAGE.name


def test_the_table_has_every_module_and_no_other() -> None:
    assert sorted(LAYER) == sorted(MODULES), "put new modules into this file's table"
    assert len(LAYER) == len(f"{PROTOCOL} {SYSTEM} {SERVICE}".split()), "and each once"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_or_sideways(module: str) -> None:
    height = ORDER.index(LAYER[module])
    for imported in filter(is_ours, imported_by(module)):
        assert ORDER.index(LAYER[imported]) <= height, f"{module} ({LAYER[module]}) imports {imported}"


@pytest.mark.parametrize("module", [module for module, layer in LAYER.items() if layer == "protocol"])
def test_the_protocol_layer_does_no_input_and_output(module: str) -> None:
    others = {imported.split(".")[0] for imported in imported_by(module) if not is_ours(imported)}
    assert others <= PURE, f"{module} imports {sorted(others - PURE)}"
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    calls = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"open", "input", "exec", "eval", "__import__"}


def test_only_the_admin_tool_imports_the_admin_tool() -> None:
    for module in MODULES:
        if not module.startswith("curling_fd.ctl"):
            assert not [name for name in imported_by(module) if name.startswith("curling_fd.ctl")], module


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import os.path, trio
from curling_fd.link import frames, transport
from curling_fd.errors import FrameError
if TYPE_CHECKING:
    from collections.abc import Iterator
def late():
    import socket as s
"""
    assert imports(source) == {
        "os.path",
        "trio",
        "curling_fd.link.frames",
        "curling_fd.link.transport",
        "curling_fd.errors",
        "collections.abc",
        "socket",
    }


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES)
def test_no_module_is_too_long_to_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 500, "split it"
