"""README.md's steps, with what a lab must do otherwise."""

from __future__ import annotations

import shlex

from attrs import evolve, frozen

from tests.lab.guests import LinuxGuest, ServerGuest

from . import readme
from .image import Install
from .payload import Payload

#: The VM of README.
VM = "db1"
#: The tap of the guest, on alpha's bridge; on beta Curling makes it.
TAP = "vnet0"
GUEST_ADDRESS = "198.51.100.5"

#: Everything in a host is 10 to 20 times slower than on a real one.
FAILURE_TIMEOUT = "5s"

#: There is no way out of a lab.
PIP = ("PIP_NO_INDEX=1", "PIP_FIND_LINKS=/mnt/lab/wheels", "PIP_DISABLE_PIP_VERSION_CHECK=1")

#: Checkpoints ten times a second would leave the emulated CPU nothing for anybody else.
LONGEST_EPOCH_MS = 1000

#: Every round is reported, and one takes less than an epoch: how far a failover went back can be counted.
GUEST = LinuxGuest(
    pages=128, dirty=16, pause_us=100000, report_ms=0, ip=f"{GUEST_ADDRESS}/24", serve=1, memory="128M"
)

#: Of its two cards, by which clients reach the server guest; IPv4 and IPv6 of each.
SERVER_ADDRESSES = ((GUEST_ADDRESS, "fd00:198::5"), ("203.0.113.5", "fd00:203::5"))
GUEST_MACS = ("52:54:00:00:01:05", "52:54:00:00:01:06")


@frozen
class Machine:
    """What runs as the VM, and in what its QEMU differs from README's.

    Attributes:
        archive: the initramfs, by its name in /mnt/lab/guest.
        taps: of its network cards.
        vhost: the kernel moves their packets.
        disks: raw images of its disks, in the same place on both hosts.
    """

    guest: LinuxGuest | ServerGuest
    archive: str
    taps: tuple[str, ...] = (TAP,)
    vhost: bool = False
    disks: tuple[str, ...] = ()


USUAL = Machine(GUEST, "initramfs")
SERVERS = Machine(
    ServerGuest(
        tuple((f"{four}/24", f"{six}/64") for four, six in SERVER_ADDRESSES),
    ),
    "servers",
    (TAP, "vnet1"),
    vhost=True,
)

WRITER = Machine(evolve(GUEST, disks=1), "initramfs", disks=("/srv/db1.img",))

#: Not started at boot: operations.md forbids it.
GUEST_UNIT = "[Unit]\nDescription=The guest\n[Service]\nExecStart=/usr/local/sbin/start-guest\n"


def installed(second: Payload) -> Install:
    """The first step, with the wheel it mentions in place of the checkout, and wheels in place of PyPI."""
    text = readme.block("sh", "pip install", {"pip install .": "pip install dist/curling_fd-*.whl"})
    return Install(second.key, second.content, text, "/mnt/lab/checkout", PIP)


def configuration(column: int) -> dict[str, str]:
    """The files of the second step for alpha (0) or beta (1): paths and contents."""
    daemon, daemon_keys = readme.file(column, "host_name")
    vm, vm_keys = readme.file(column, "qmp =")
    return {
        daemon: daemon_keys,
        vm: f'{vm_keys}arbiter = "file"\narbiter_directory = "/srv/arbiter"\n'
        f'longest_epoch = "{LONGEST_EPOCH_MS}ms"\n',
        f"{daemon}.d/lab.toml": f'failure_timeout = "{FAILURE_TIMEOUT}"\nstop_limit = "10s"\n',
    }


def tap_command(tap: str) -> str:
    """README's commands that make the guest's tap, for one of that name."""
    return readme.block("sh", "ip tuntap add", {TAP: tap})


def guest_command(machine: Machine = USUAL) -> str:
    """The QEMU of the third step, with the lab's guest in it and its console where `follow` finds it."""
    arguments = machine.guest.arguments()
    arguments[arguments.index("-kernel") + 1] = "/mnt/lab/guest/kernel"
    arguments[arguments.index("-initrd") + 1] = f"/mnt/lab/guest/{machine.archive}"
    console = "socket,id=console,path=/run/vm/console.sock,server=on,wait=off,logfile=/run/vm/console.log"
    disks = "".join(
        f" -drive file={path},format=raw,if=none,id=drive{number} -device virtio-blk-pci,drive=drive{number}"
        for number, path in enumerate(machine.disks)
    )
    replace = {
        "-m 1G": f"-m {machine.guest.memory}",
        "-vnc :1": "-display none -vga none",
        "-drive file=/srv/live.iso,media=cdrom,readonly=on": (
            f"{shlex.join(arguments)} -chardev {console} -serial chardev:console{disks}"
        ),
    }
    vhost = ",vhost=on" if machine.vhost else ""
    netdev, card = (
        f"tap,id=net0,ifname={TAP},script=no,downscript=no",
        f"virtio-net-pci,netdev=net0,mac={GUEST_MACS[0]}",
    )
    replace[netdev], replace[card] = f"{netdev}{vhost}", card
    for number, tap in enumerate(machine.taps[1:], 1):
        # Behind the first: the guest numbers its cards in this order.
        another = f"tap,id=net{number},ifname={tap},script=no,downscript=no{vhost}"
        replace[card] += (
            f" -netdev {another} -device virtio-net-pci,netdev=net{number},mac={GUEST_MACS[number]}"
        )
    return readme.block("sh", "qemu-system-x86_64 -name", replace)
