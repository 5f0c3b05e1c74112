"""Runs in a lab host: `plug_probe.py SCENARIO...`, each in a network name space of its own.

Before a scenario it prints "SCENARIO begins", after it "SCENARIO ended with STATUS"; 0 is a pass.

guest = this process - vnet0, vnet1 -+
free  = this process - vnet9 --------+- br0 - wire - far        `far` hears what leaves
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import itertools
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import trio
import trio.testing
from attrs import define, field
from tap import Tap, Wire, numbered

from curling_fd.errors import ModuleMissing, OutputError, PortTaken
from curling_fd.netlink.links import link
from curling_fd.netlink.socket import RouteSocket
from curling_fd.output import plug
from curling_fd.output.hold import HoldStatistics
from curling_fd.output.placement import Leftover, leftovers
from curling_fd.output.plug import PlugHold
from curling_fd.output.watch import OutputWatch

LIMIT = 64 << 20
#: How often guest and daemon are killed at a random moment.
KILLS = int(os.environ["CURLING_KILLS"])

#: What a daemon says when an epoch is committed: the number of the first packet behind it.
COMMIT = struct.Struct("=Q")

#: Bytes of a numbered frame.
FRAME = 64
MARK = 1 << 31
#: linux/sched.h; Python 3.12 has both.
CLONE_NEWNET = 0x40000000
MODULES = ("ifb", "sch_plug", "sch_ingress", "cls_matchall", "act_mirred")

Scenario = Callable[["Net"], Awaitable[None]]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def sh(command: str) -> str:
    return subprocess.run(command, shell=True, check=True, text=True, stdout=subprocess.PIPE).stdout


@define
class Net:
    """The name space, put up."""

    taps: dict[str, Tap]
    wire: Wire
    marks: Iterator[int] = field(factory=lambda: iter(range(MARK, MARK << 1)))

    @property
    def guest(self) -> Tap:
        return self.taps["vnet0"]

    @property
    def other(self) -> Tap:
        return self.taps["vnet1"]

    def left(self, count: int = 0) -> list[int]:
        """What has left since the last look, which is `count` frames at least.

        What is let out leaves when the kernel comes to it: those are waited for first, then a frame that
        nobody holds. By then, more would have come too.
        """
        heard = self.wire.hear(count)
        mark = next(self.marks)
        self.taps["vnet9"].number(mark)
        while mark not in heard:
            heard += self.wire.hear(1)
        return [number for number in heard if number != mark]

    def have(self, expected: Sequence[int], where: str = "") -> None:
        """Just these have left, in this order."""
        left = self.left(len(expected))
        assert left == [*expected], f"{where}: {len(left)} left instead of {len(expected)}: {left[:20]}"

    def state(self, *, counts: bool = False) -> str:
        """What the host's own tools say of it."""
        tc = "tc -s" if counts else "tc"
        ports = " ".join(self.taps)
        said = sh(f"ip -d link; {tc} qdisc; for port in {ports}; do {tc} filter show dev $port ingress; done")
        # Of a bridge: they run.
        return re.sub(r"_timer +[0-9.]+", "_timer", said)


@contextmanager
def put_up() -> Iterator[Net]:
    # Nobody but us sends anything.
    sh("sysctl -q net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1")
    sh("ip link add br0 type bridge; ip link set br0 up")
    with contextlib.ExitStack() as stack:
        taps = {name: stack.enter_context(Tap(name)) for name in ("vnet0", "vnet1", "vnet9")}
        wire = stack.enter_context(Tap("wire"))
        # It never has too little room: what does not come out there did not leave.
        sh("ip link set wire txqueuelen 200000; tc qdisc replace dev wire root noqueue")
        for name in ("wire", *taps):
            sh(f"ip link set {name} master br0 up")
        # Ports forward a moment after their link is up.
        while "disabled" in sh("bridge link"):
            pass
        net = Net(taps, Wire(wire))
        net.have([])
        yield net


def hold(*ports: str, limit: int = LIMIT) -> PlugHold:
    return PlugHold(ports or ("vnet0",), limit=limit, vm="db1")


async def barrier(held: PlugHold, sequence: int) -> None:
    """As a capture does it: in another thread."""
    await trio.to_thread.run_sync(held.barrier, sequence)


@contextmanager
def sending(tap: Tap, pause: float = 0.0) -> Iterator[Callable[[], int]]:
    """Another process sends 0, 1, 2, ... until the end of the block, or until what is yielded is called.

    That gives how many it has sent.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        stop: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
        count = 0
        while not stop:
            tap.number(count)
            count += 1
            if count == 1:
                os.write(writer, b"!")
        os.write(writer, count.to_bytes(8, "big"))
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"!"
    sent: list[int] = []

    def stop_it() -> int:
        if not sent:
            os.kill(pid, signal.SIGTERM)
            sent.append(int.from_bytes(os.read(reader, 8), "big"))
            os.waitpid(pid, 0)
            os.close(reader)
        return sent[0]

    try:
        yield stop_it
    finally:
        stop_it()


def counted(net: Net, held: PlugHold, expected: int) -> None:
    found = held.statistics()
    assert found == HoldStatistics(expected, expected * FRAME, 0), f"{found} instead of {expected}"


def same(before: str, after: str) -> None:
    changed = difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm="")
    assert before == after, "\n".join(changed)


@contextmanager
def refusal(kind: type[OutputError], what: str) -> Iterator[list[OutputError]]:
    """The block raises just this error about just that; it is in the list then."""
    caught: list[OutputError] = []
    try:
        yield caught
    except OutputError as error:
        caught.append(error)
    (refused,) = caught
    assert type(refused) is kind, repr(refused)
    assert refused.what == what, refused


@scenario
async def exact_counts_at_every_step(net: Net) -> None:
    before = net.state()
    held = hold()
    await held.attach()
    net.guest.number(*range(5))
    net.have([*range(5)], "open until the first barrier")
    counted(net, held, 0)
    await barrier(held, 1)
    net.guest.number(*range(8))
    net.have([])
    counted(net, held, 8)
    await held.release(1)
    net.have([], "nothing was sent before the first barrier")
    await barrier(held, 2)
    net.guest.number(*range(8, 12))
    counted(net, held, 12)
    await held.release(1)
    net.have([], "that one was released")
    await held.release(2)
    net.have([*range(8)])
    counted(net, held, 4)
    await held.release(2)
    await held.release(3)
    net.have([])
    await barrier(held, 3)
    try:
        await barrier(held, 4)
    except RuntimeError:
        pass
    else:
        raise AssertionError("a second barrier must not be possible: the plug would forget the first")
    await held.release(3)
    net.have([*range(8, 12)])
    await barrier(held, 4)
    net.guest.number(20, 21)
    await held.detach()
    net.have([20, 21])
    same(before, net.state())
    await held.detach()
    same(before, net.state())


@scenario
async def whenever_guest_and_daemon_are_killed_nothing_uncommitted_has_left(net: Net) -> None:
    chance = random.Random(5)
    committed_in_all = 0
    for kill in range(KILLS):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            # In a thread of its own, for this one is in the middle of a run already.
            seed = chance.random()
            thread = threading.Thread(target=trio.run, args=(epochs_for_ever, net, seed, writer))
            thread.start()
            thread.join()
            os._exit(1)
        os.close(writer)
        assert os.read(reader, COMMIT.size) == COMMIT.pack(0), "it could not begin"
        await trio.sleep(chance.uniform(0, 0.3))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        said = b"".join(iter(partial(os.read, reader, 1 << 16), b""))
        os.close(reader)
        commits = [0, 0, *(number for (number,) in COMMIT.iter_unpack(said))]
        committed_in_all += len(commits) - 2
        left = net.left(commits[-2])
        with RouteSocket() as route:
            (leftover,) = leftovers(route)
        held = PlugHold.adopt(leftover, limit=LIMIT)
        await held.drop()
        await held.detach()
        left += net.left()
        assert left == [*range(len(left))], f"kill {kill}: in order, and none missing"
        # Whether the last commit's packets were let out is not known: it was killed before, or after.
        assert commits[-2] <= len(left) <= commits[-1], f"kill {kill}: {len(left)} left, {commits[-2:]}"
    assert committed_in_all > KILLS, "most were killed in the middle of something"


async def epochs_for_ever(net: Net, seed: float, told: int) -> None:
    """A daemon and its guest, which sends 0, 1, 2 ...; tells of each commit, and lets out what it covers."""
    chance = random.Random(seed)
    held = hold("vnet0")
    await held.attach()
    held.barrier(0)
    await held.release(0)
    os.write(told, COMMIT.pack(0))
    numbers = itertools.count()
    for sequence in itertools.count(1):
        net.guest.number(*itertools.islice(numbers, chance.choice((0, 1, 2, 30))))
        await barrier(held, sequence)
        boundary = next(numbers)
        net.guest.number(boundary, *itertools.islice(numbers, chance.choice((0, 3))))
        await trio.sleep(chance.uniform(0, 0.005))
        os.write(told, COMMIT.pack(boundary))
        await held.release(sequence)


@scenario
async def what_is_put_into_place_reads_back(net: Net) -> None:
    sh("ip link set vnet1 name tap4fb1c2d3-9a")
    held = hold("vnet0", "tap4fb1c2d3-9a")
    await held.attach()
    links = {each["ifname"]: each for each in json.loads(sh("ip -d -j link"))}
    interface = links["plug-vnet0"]
    assert interface["ifalias"] == "curling:db1"
    assert interface["linkinfo"]["info_kind"] == "ifb"
    assert "UP" in interface["flags"]
    assert (interface["mtu"], interface["txqlen"], interface["qdisc"]) == (1000, 1000, "plug")
    qdiscs = {(each["dev"], each["kind"]): each for each in json.loads(sh("tc -j qdisc"))}
    assert qdiscs["plug-vnet0", "plug"]["handle"] == "1:"
    assert qdiscs["plug-vnet0", "plug"]["root"]
    assert qdiscs["vnet0", "ingress"]["handle"] == "ffff:"
    (found,) = [each for each in json.loads(sh("tc -j filter show dev vnet0 ingress")) if "options" in each]
    assert (found["protocol"], found["pref"], found["kind"]) == ("all", 2, "matchall")
    (action,) = found["options"]["actions"]
    assert (action["kind"], action["mirred_action"], action["direction"]) == ("mirred", "redirect", "egress")
    assert (action["to_dev"], action["control_action"]["type"]) == ("plug-vnet0", "stolen")
    long = [name for name in links if name.startswith("plug-") and name != "plug-vnet0"]
    assert len(long) == 1 and len(long[0]) == 15
    sh("sysctl -q net.ipv6.conf.all.disable_ipv6=0")
    assert not sh("ip -6 address show dev plug-vnet0"), "the kernel must not send anything of its own"
    await held.detach()


@scenario
async def many_epochs_leave_whole_and_in_order(net: Net) -> None:
    chance = random.Random(4)
    held = hold("vnet0", "vnet1")
    await held.attach()
    await barrier(held, 0)
    await held.release(0)
    numbers = iter(range(MARK))
    waiting: list[int] = []
    for sequence in range(1, 150):
        epoch = [next(numbers) for _ in range(chance.choice((0, 0, 1, 2, 7, 300)))]
        for number in epoch:
            net.taps[chance.choice(("vnet0", "vnet1"))].number(number)
        waiting += epoch
        await barrier(held, sequence)
        early = [next(numbers) for _ in range(chance.choice((0, 3)))]
        net.guest.number(*early)
        net.have([], f"before the release of {sequence}")
        counted(net, held, len(waiting) + len(early))
        await held.release(sequence)
        # Either port keeps its order; between them there is none.
        assert sorted(net.left(len(waiting))) == waiting, f"after the release of {sequence}"
        waiting = early
    await held.detach()
    net.have(waiting)


@scenario
async def ports_keep_their_own_order(net: Net) -> None:
    held = hold("vnet0", "vnet1")
    await held.attach()
    await barrier(held, 1)
    net.guest.number(*range(100))
    net.other.number(*range(1000, 1100))
    await held.release(1)
    net.have([])
    await barrier(held, 2)
    net.other.number(2000)
    await held.release(2)
    left = net.left(200)
    assert [number for number in left if number < 1000] == [*range(100)]
    assert [number for number in left if number >= 1000] == [*range(1000, 1100)]
    await held.drop()
    await held.detach()
    net.have([])


@scenario
async def nothing_is_lost_or_overtaken_while_a_guest_sends(net: Net) -> None:
    before = net.state()
    for round_ in range(15):
        held = hold()
        with sending(net.guest) as stop:
            await held.attach()
            for sequence in range(6):
                await barrier(held, sequence)
                await held.release(sequence)
            await barrier(held, 6)
            await held.detach()
            sent = stop()
        left = net.left(sent)
        assert left == [*range(sent)], f"round {round_}: {differences(left, sent)}"
        same(before, net.state())


def differences(left: list[int], sent: int) -> str:
    missing = sorted(set(range(sent)) - set(left))
    turned = [(one, two) for one, two in itertools.pairwise(left) if two != one + 1]
    return f"{sent} sent, {len(left)} left; missing {missing[:5]}, not in a row {turned[:5]}"


@scenario
async def nothing_leaves_after_a_drop_until_the_detaching(net: Net) -> None:
    before = net.state()
    for round_ in range(15):
        held = hold("vnet0", "vnet1")
        await held.attach()
        await barrier(held, 1)
        net.guest.number(*range(50))
        net.other.number(*range(50))
        net.have([])
        with sending(net.guest) as stop:
            await held.drop()
            assert held.statistics() == HoldStatistics(0, 0, 0)
            await held.release(1)
            await held.drop()
            sent = stop()
        net.have([], f"round {round_}, {sent} sent")
        net.guest.number(*range(50))
        net.other.number(*range(50))
        net.have([])
        await held.detach()
        net.have([])
        net.guest.number(7)
        net.other.number(8)
        net.have([7, 8])
        same(before, net.state())


@scenario
async def what_is_dropped_stays_dropped_though_the_guest_sends_through_the_detaching(net: Net) -> None:
    for _ in range(5):
        held = hold()
        await held.attach()
        await barrier(held, 1)
        net.guest.number(*range(MARK - 500, MARK))
        with sending(net.guest) as stop:
            await held.drop()
            await held.detach()
            sent = stop()
        left = net.left()
        assert left == [*range(sent - len(left), sent)], "only the last ones, without a gap"


@scenario
async def the_bound_is_the_kernels(net: Net) -> None:
    held = hold(limit=10 * FRAME)
    await held.attach()
    await barrier(held, 1)
    net.guest.number(*range(15))
    assert held.statistics() == HoldStatistics(10, 10 * FRAME, 5)
    held.set_limit(12 * FRAME)
    net.guest.number(*range(15, 20))
    assert held.statistics() == HoldStatistics(12, 12 * FRAME, 8)
    await held.release(1)
    await barrier(held, 2)
    await held.release(2)
    net.have([*range(10), 15, 16])
    await held.detach()


def left_by_another(net: Net, before: int, after: int, *finally_: str) -> Leftover:
    """Another daemon attaches, sends so many before and after a barrier, and is killed."""
    fd = net.guest.fd
    argv = [sys.executable, __file__, "daemon", str(fd), str(before), str(after), *finally_]
    assert subprocess.run(argv, pass_fds=[fd]).returncode == -signal.SIGKILL
    with RouteSocket() as route:
        (found,) = leftovers(route)
        assert leftovers(route, ["db2"]) == []
    assert found.vm == "db1"
    assert sorted(each.port for each in found.placements) == ["vnet0", "vnet1"]
    return found


async def daemon(fd: str, before: str, after: str, *finally_: str) -> None:
    held = hold("vnet0", "vnet1")
    await held.attach()
    held.barrier(0)
    await held.release(0)
    for number in range(int(before)):
        os.write(int(fd), numbered(number))
    held.barrier(1)
    for number in range(100, 100 + int(after)):
        os.write(int(fd), numbered(number))
    if "release" in finally_:
        await held.release(1)
    if "drop" in finally_:
        await held.drop()
    os.kill(os.getpid(), signal.SIGKILL)


@scenario
async def what_a_killed_daemon_held_is_taken_over_as_it_is(net: Net) -> None:
    before = net.state()
    found = left_by_another(net, 4, 5)
    assert found.complete and not found.dropped
    net.have([])
    held = PlugHold.adopt(found, limit=LIMIT, unreleased=1)
    counted(net, held, 9)
    await held.release(1)
    net.have([*range(4)])
    await barrier(held, 2)
    net.guest.number(7)
    await held.release(2)
    net.have([*range(100, 105)])
    await held.detach()
    net.have([7])
    same(before, net.state())
    # After a release, nothing needs to be known.
    held = PlugHold.adopt(left_by_another(net, 4, 5, "release"), limit=LIMIT)
    net.have([*range(4)])
    await barrier(held, 1)
    await held.release(1)
    net.have([*range(100, 105)])
    await held.detach()
    # What is not known may come late, and never early.
    held = PlugHold.adopt(left_by_another(net, 4, 3), limit=LIMIT)
    await barrier(held, 9)
    net.have([])
    await held.release(9)
    net.have([0, 1, 2])
    await held.detach()
    net.have([3, 100, 101, 102])
    same(before, net.state())


@scenario
async def what_a_killed_daemon_left_can_be_thrown_away(net: Net) -> None:
    before = net.state()
    for drop in (False, True):
        found = left_by_another(net, 4, 5, *["drop"] * drop)
        assert found.dropped == drop
        assert found.complete != drop
        held = PlugHold.adopt(found, limit=LIMIT)
        if not drop:
            await held.drop()
        net.guest.number(1)
        await held.detach()
        net.have([])
        same(before, net.state())


@scenario
async def a_watch_sees_each_packet_once_though_it_is_held(net: Net) -> None:
    held = hold()
    await held.attach()
    outputs: list[int] = []
    bell = trio.Event()

    def on_output() -> None:
        outputs.append(1)
        bell.set()

    with OutputWatch(["vnet0"]) as watch:
        async with trio.open_nursery() as nursery:

            async def run_it() -> None:
                await watch.run(on_output=on_output, on_change=print)

            nursery.start_soon(run_it)
            for sequence in range(1, 4):
                await barrier(held, sequence)
                watch.barrier()
                watch.arm()
                await held.release(sequence)
                net.have([*range(8)] * (sequence > 1))
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert len(outputs) == sequence - 1, "what is let out is not seen again"
                net.guest.number(*range(8))
                with trio.fail_after(20):
                    while len(outputs) < sequence:
                        bell = trio.Event()
                        await bell.wait()
                assert len(outputs) == sequence
            nursery.cancel_scope.cancel()
    await held.detach()


@scenario
async def a_missing_module_is_named_and_nothing_is_left(net: Net) -> None:
    for missing in MODULES:
        sh(f"modprobe -ra {' '.join(reversed(MODULES))}")
        blocked = Path("/etc/modprobe.d/missing.conf")
        blocked.write_text(f"install {missing} /bin/false\n")
        before = net.state(counts=True)
        try:
            with refusal(ModuleMissing, "vnet0") as caught:
                await hold("vnet0", "vnet1").attach()
        finally:
            blocked.unlink()
        (error,) = caught
        assert isinstance(error, ModuleMissing)
        assert error.module == missing, error
        same(before, net.state(counts=True))


@scenario
async def every_failure_leaves_the_host_as_it_was(net: Net) -> None:
    async def refused(kind: type[OutputError], what: str) -> None:
        before = net.state()
        with refusal(kind, what):
            await hold("vnet0", "vnet1").attach()
        same(before, net.state())
        net.guest.number(1)
        net.have([1])

    def index_of(route: RouteSocket, port: str) -> int:
        return link(route, port).index

    for kind in ("clsact", "ingress"):
        sh(f"tc qdisc add dev vnet1 {kind}; tc filter add dev vnet1 ingress pref 7 matchall action drop")
        await refused(PortTaken, "vnet1")
        examine = vars(plug)["examine"]
        vars(plug)["examine"] = index_of
        # Somebody was quicker: the first port is in place by then.
        await refused(OutputError, "vnet1")
        vars(plug)["examine"] = examine
        sh(f"tc qdisc del dev vnet1 {kind}")
    sh("ip link add plug-vnet1 type ifb")
    await refused(OutputError, "vnet1")
    sh("ip link del plug-vnet1")
    sh("ip link set vnet1 name vnet2")
    await refused(OutputError, "vnet1")
    sh("ip link set vnet2 name vnet1")
    held = hold("vnet0", "vnet1")
    await held.attach()
    sh("tc qdisc replace dev plug-vnet0 root pfifo")
    with refusal(OutputError, "vnet0"):
        held.barrier(1)
    await held.detach()
    assert "plug-" not in net.state()


@scenario
async def a_port_that_changes_while_it_is_held(net: Net) -> None:
    held = hold("vnet0", "vnet1")
    await held.attach()
    await barrier(held, 1)
    sh("ip link set vnet0 down; ip link set vnet0 name other; ip link set other up")
    while "disabled" in sh("bridge link"):
        pass
    net.guest.number(1, 2, 3)
    net.have([])
    await held.release(1)
    await barrier(held, 2)
    await held.release(2)
    net.have([1, 2, 3])
    net.other.number(4)
    net.guest.number(5)
    net.guest.close()
    await barrier(held, 3)
    await held.release(3)
    net.have([4])
    sh("ip link del plug-vnet1")
    net.other.number(6)
    net.have([], "without its plug a port lets nothing out")
    with refusal(OutputError, "vnet1"):
        held.barrier(4)
    await held.detach()
    net.other.number(7)
    net.have([7])
    assert "plug-" not in net.state() and "ingress" not in net.state()


@scenario
async def filters_that_others_add_later_survive(net: Net) -> None:
    held = hold()
    await held.attach()
    sh("tc filter add dev vnet0 ingress pref 9 matchall action pass")
    await barrier(held, 1)
    net.guest.number(1)
    net.have([])
    await held.detach()
    net.have([1])
    found = [each for each in json.loads(sh("tc -j filter show dev vnet0 ingress")) if "options" in each]
    assert [each["pref"] for each in found] == [9]


def main() -> None:
    if sys.argv[1] == "daemon":
        trio.run(partial(daemon, *sys.argv[2:]))
    for name in sys.argv[1:]:
        print(f"{name} begins", flush=True)
        if (pid := os.fork()) == 0:
            assert ctypes.CDLL(None).unshare(CLONE_NEWNET) == 0
            with put_up() as net:
                trio.run(SCENARIOS[name], net)
            sys.exit()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(f"{name} ended with {status}", flush=True)


if __name__ == "__main__":
    main()
