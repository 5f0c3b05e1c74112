"""What runs inside a lab VM, as the part of QEMU's command line that boots it."""

from __future__ import annotations

from typing import Literal, Protocol

from attrs import frozen

from .bootsector import boot_sector
from .initramfs import initramfs
from .kernel import kernel
from .servers import Servers, servers

# Each of these saves an emulated CPU a noticeable part of the boot.
_FAST_BOOT = "quiet nokaslr no_timer_check cryptomgr.notests"

# panic=0: a panicked kernel stays where it is instead of rebooting.
_CMDLINE = f"console=ttyS0 panic=0 {_FAST_BOOT}"


class Guest(Protocol):
    """`memory` is what it runs well with, in the form of QEMU's -m."""

    @property
    def memory(self) -> str: ...

    def arguments(self) -> list[str]:
        """The options that boot it. May build or download what it boots, which takes its time once."""
        ...


@frozen
class LinuxGuest:
    """Debian's kernel with guest.c as its only program; the fields are explained there.

    `ip` ("10.0.0.5/24") is given to its first network card; it sends numbered datagrams to `send_to`,
    and is a TCP server with `serve=1`. It has as many virtio-blk `disks` to write to, with `writers` on each.
    """

    pages: int = 4096
    dirty: int = 256
    pause_us: int = 1000
    report_ms: int = 200
    threads: int = 0
    mode: Literal["verify", "dirty"] = "verify"
    ip: str | None = None
    send_to: str | None = None
    send_gap_us: int | None = None
    serve: int | None = None
    disks: int | None = None
    writers: int | None = None
    block: int | None = None
    disk_gap_us: int | None = None
    disk_most: int | None = None
    memory: str = "256M"

    def arguments(self) -> list[str]:
        """-kernel, -initrd and -append."""
        booted = kernel()
        settings = {
            "pages": self.pages,
            "dirty": self.dirty,
            "pause_us": self.pause_us,
            "report_ms": self.report_ms,
            "threads": self.threads,
            "mode": self.mode,
            "ip": self.ip,
            "send_to": self.send_to,
            "send_gap_us": self.send_gap_us,
            "serve": self.serve,
            "disks": self.disks,
            "writers": self.writers,
            "block": self.block,
            "disk_gap_us": self.disk_gap_us,
            "disk_most": self.disk_most,
        }
        given = " ".join(f"curling.{key}={value}" for key, value in settings.items() if value is not None)
        cmdline = f"{_CMDLINE} {given}"
        return ["-kernel", str(booted.image), "-initrd", str(initramfs(booted)), "-append", cmdline]


@frozen
class ServerGuest:
    """The Linux guest with real servers (see servers.py); its own program takes little of its time.

    Args:
        addresses: of each network card: IPv4 and IPv6, with their lengths.
    """

    # The kernel has the archive in memory and lets what is unpacked have half of the rest.
    addresses: tuple[tuple[str, ...], ...]
    memory: str = "224M"

    def servers(self) -> Servers:
        """What it boots, and the keys to it."""
        return servers(kernel())

    def arguments(self) -> list[str]:
        """-kernel, -initrd and -append."""
        cards = [f"curling.eth{number}={','.join(each)}" for number, each in enumerate(self.addresses)]
        given = " ".join(["curling.pages=64 curling.dirty=8 curling.pause_us=20000", *cards])
        archive = str(self.servers().archive)
        return ["-kernel", str(kernel().image), "-initrd", archive, "-append", f"{_CMDLINE} {given}"]


@frozen
class BootSectorGuest:
    """The real-mode guest of bootsector.S, from an option ROM or from a read-only floppy."""

    report_ms: int = 200
    ticks: int = 10
    floppy: bool = False
    memory: str = "16M"

    def arguments(self) -> list[str]:
        """-option-rom or -drive."""
        image = boot_sector(self.report_ms, self.ticks)
        if self.floppy:
            return ["-drive", f"if=floppy,format=raw,readonly=on,file={image}"]
        return ["-option-rom", str(image)]
