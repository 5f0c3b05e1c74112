"""README.md's steps, with what a lab must do otherwise."""

from __future__ import annotations

import shlex

from tests.lab.guests import LinuxGuest

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


def guest_command() -> str:
    """The QEMU of the third step, with the lab's guest in it and its console where `follow` finds it."""
    arguments = GUEST.arguments()
    arguments[arguments.index("-kernel") + 1] = "/mnt/lab/guest/kernel"
    arguments[arguments.index("-initrd") + 1] = "/mnt/lab/guest/initramfs"
    console = "socket,id=console,path=/run/vm/console.sock,server=on,wait=off,logfile=/run/vm/console.log"
    replace = {
        "-m 1G": f"-m {GUEST.memory}",
        "-vnc :1": "-display none -vga none",
        "-drive file=/srv/live.iso,media=cdrom,readonly=on": (
            f"{shlex.join(arguments)} -chardev {console} -serial chardev:console"
        ),
    }
    return readme.block("sh", "qemu-system-x86_64 -name", replace)
