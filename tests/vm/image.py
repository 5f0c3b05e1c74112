"""The disk of a lab host: Debian 13 with a kernel, systemd and QEMU, and what is installed in it beforehand.

Made in two steps, both kept in the cache: the *tree* (the distribution, a minute) and the *disk* (the tree
with the files in host_files/ and with what is installed in it, half a minute). What has to be mounted for it
is mounted in a mount name space of the one process that needs it, and gone with that.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from attrs import frozen

from tests.lab.cache import digest, made
from tests.lab.initramfs import pack
from tests.lab.kernel import Kernel, module_files, unpack_image
from tests.lab.roots import qemu_root

from .tidy import in_use

_HERE = Path(__file__).parent
_FILES = _HERE / "host_files"
_DISK_BYTES = 6 << 30

_PACKAGES = (
    # A host.
    "linux-image-amd64", "systemd-sysv", "systemd", "udev", "dbus", "kmod", "iproute2", "procps",
    "busybox-static",
    # What README's commands and a person at the shell want.
    "qemu-system-x86", "nftables", "python3", "python3-venv", "iputils-ping", "iputils-arping", "less",
    # python-prctl is compiled, by whoever installs it without a wheel and by `payload`.
    "python3-dev", "python3-setuptools", "gcc", "libc6-dev", "libcap-dev",
)  # fmt: skip

#: Nobody reads these in a lab host; they are a third of the files.
_DPKG = "path-exclude=/usr/share/doc/*\npath-exclude=/usr/share/man/*\npath-exclude=/usr/share/locale/*\n"

#: Debian's own initramfs is not used, so it may be small.
_NO_INITRAMFS = {"etc/initramfs-tools/conf.d/lab": "MODULES=list\nCOMPRESS=cat\n"}

#: With udev and the like in it, as Debian's is, an emulated CPU takes five seconds longer to the disk.
_DRIVERS = ["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"]
_INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs devtmpfs /dev
for module in $(/bin/busybox cat /modules/order); do /bin/busybox insmod "/modules/$module"; done
/bin/busybox mount -t ext4 /dev/vda /root
exec /bin/busybox switch_root /root /sbin/init
"""


@frozen
class Variant:
    """A kind of host. `packages` come on top; `script` runs (sh -e) in the finished tree as its root;
    `finish` runs so in what becomes the disk, with the files of the folder `sources` in /tmp/sources;
    `cmdline` is put at the end of the kernel's."""

    name: str = "host"
    packages: tuple[str, ...] = ()
    script: str = ""
    sources: Path | None = None
    finish: str = ""
    cmdline: str = ""


@frozen
class Install:
    """Commands (bash -ex) that run in what becomes a disk, natively: an emulated CPU takes minutes for them.

    `folder` is /mnt/lab for them, `cwd` is where they run; `key` says what is in the folder.
    """

    key: str
    folder: Path
    script: str
    cwd: str
    environment: tuple[str, ...] = ()


@frozen
class Image:
    """What a host boots: `disk` (raw, never written to), `kernel` and `initrd`."""

    disk: Path
    kernel: Path
    initrd: Path
    cmdline: str


PLAIN = Variant()


def tree(variant: Variant = PLAIN) -> Path:
    """The folder of the distribution; nobody may change it."""
    packages = (*_PACKAGES, *variant.packages)
    inputs = (*packages, variant.script, _DPKG, *_NO_INITRAMFS.values(), _BUILD)
    key = f"roots/vm-{variant.name}-{digest(*inputs)}"
    return made(key, lambda target: _make_tree(target, packages, variant.script))


def image(variant: Variant = PLAIN, install: Install | None = None) -> Image:
    """The image of `variant`, with `install` in it, made when missing."""
    files = sorted(path for path in _FILES.rglob("*") if path.is_file())
    names = [str(path.relative_to(_FILES)) for path in files]
    root = tree(variant)
    sources = sorted(path for path in variant.sources.iterdir() if path.is_file()) if variant.sources else []
    inputs: tuple[str | Path, ...] = (
        *names,
        *files,
        *(path.name for path in sources),
        *sources,
        variant.finish,
    )
    wanted = (install.key, install.script, install.cwd, *install.environment) if install else ()
    key = f"vm/{variant.name}-{digest(root.name, *inputs, *wanted, *_MADE_BY)}"
    with in_use(root):
        folder = made(key, lambda target: _make_image(root, target, sources, variant.finish, install))
    return Image(folder / "disk.raw", folder / "vmlinux", folder / "initrd", variant.cmdline)


def in_tree(root: Path, script: str, *arguments: str) -> None:
    """Run a shell script (sh -e) with `root` as its $1 and a mount name space of its own, as root."""
    command = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    command += ["sh", "-ec", script, "sh", str(root), *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"making {root} failed ({done.returncode}):\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )


_BUILD = """
root=$1; script=$2; shift 2
mount -t proc proc "$root/proc"
inside() { chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
    ${http_proxy:+http_proxy=$http_proxy} DEBIAN_FRONTEND=noninteractive "$@"; }
printf '#!/bin/sh\\nexit 101\\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
cat /etc/resolv.conf >"$root/etc/resolv.conf"
inside apt-get -q update
inside apt-get -q -y install --no-install-recommends "$@"
[ -z "$script" ] || inside sh -ec "$script"
inside apt-get clean
rm -rf "$root"/var/lib/apt/lists/* "$root/usr/sbin/policy-rc.d"
"""

#: Nothing of this is a host's business while it is tested, and each costs an emulated CPU seconds.
_MASKED = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer",
    "e2scrub_reap.service", "fstrim.timer", "systemd-tmpfiles-clean.timer", "nftables.service",
    "getty@tty1.service", "systemd-logind.service", "systemd-pstore.service", "systemd-binfmt.service",
    "proc-sys-fs-binfmt_misc.automount", "sys-kernel-config.mount", "sys-fs-fuse-connections.mount",
    "modprobe@drm.service", "modprobe@configfs.service", "modprobe@efi_pstore.service",
    "modprobe@fuse.service", "systemd-update-utmp.service", "systemd-random-seed.service",
    "systemd-remount-fs.service", "systemd-udev-load-credentials.service",
    "systemd-tmpfiles-setup-dev-early.service", "systemd-modules-load.service",
    "systemd-user-sessions.service", "sys-kernel-tracing.mount", "sys-kernel-debug.mount",
    "dev-mqueue.mount", "dev-hugepages.mount", "run-lock.mount", "tmp.mount",
)  # fmt: skip

_DISK = """
root=$1; files=$2; disk=$3; bytes=$4; sources=$5; finish=$6; shift 6
lab=$1; cwd=$2; script=$3; environment=$4; shift 4
path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
inside() { chroot "$root" /usr/bin/env -i PATH=$path HOME=/root LC_ALL=C.UTF-8 "$@"; }
cp -dR --no-preserve=ownership --remove-destination "$files/." "$root/"
rm -f "$root/etc/resolv.conf" "$root/etc/hostname" "$root/etc/machine-id"
: >"$root/etc/machine-id"
mkdir -p "$root/mnt/lab" "$root/srv/arbiter" "$root/var/log/journal"
for unit; do ln -sf /dev/null "$root/etc/systemd/system/$unit"; done
for unit in "$files"/etc/systemd/system/lab-*.service; do
    mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
    ln -s "../$(basename "$unit")" "$root/etc/systemd/system/multi-user.target.wants/"
done
mount -t proc proc "$root/proc"
if [ -n "$script" ]; then
    mount --bind "$lab" "$root/mnt/lab"
    inside $environment bash -exc "cd $cwd; $script"
    umount "$root/mnt/lab"
fi
ln -sf /usr/lib/systemd/system/multi-user.target "$root/etc/systemd/system/default.target"
# What is made once after an update of /usr was made when its packages were installed.
touch "$root/etc/.updated" "$root/var/.updated"
if [ -n "$finish" ]; then
    mkdir "$root/tmp/sources"
    mount --bind "$sources" "$root/tmp/sources"
    inside sh -ec "$finish"
    umount "$root/tmp/sources"
    rmdir "$root/tmp/sources"
fi
umount "$root/proc"
truncate -s "$bytes" "$disk"
mkfs.ext4 -q -L lab-root -m 0 -E lazy_itable_init=1,nodiscard -d "$root" "$disk"
"""


_MADE_BY = (_DISK, str(_DISK_BYTES), *_MASKED, *_DRIVERS, _INIT)


def _make_tree(target: Path, packages: tuple[str, ...], script: str) -> None:
    subprocess.run(["cp", "-a", str(qemu_root("trixie")), str(target)], check=True)
    early = {"etc/dpkg/dpkg.cfg.d/lab": _DPKG, **_NO_INITRAMFS}
    for name, text in early.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    in_tree(target, _BUILD, script, *packages)


def _make_image(root: Path, target: Path, sources: list[Path], finish: str, install: Install | None) -> None:
    target.mkdir()
    (packed,) = root.glob("boot/vmlinuz-*")
    unpack_image(packed, target / "vmlinux")
    _make_initrd(root, packed.name.removeprefix("vmlinuz-"), target / "initrd")
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=".image-") as folder:
        copy = Path(folder) / "root"
        subprocess.run(["cp", "-a", str(root), str(copy)], check=True)
        beside = Path(folder) / "sources"
        beside.mkdir()
        for path in sources:
            shutil.copy2(path, beside)
        arguments = [str(_FILES), str(target / "disk.raw"), str(_DISK_BYTES), str(beside), finish]
        if install:
            arguments += [str(install.folder), install.cwd, install.script, " ".join(install.environment)]
        else:
            arguments += [""] * 4
        in_tree(copy, _DISK, *arguments, *_MASKED)


def _make_initrd(root: Path, release: str, target: Path) -> None:
    """The archive of what mounts the disk, uncompressed."""
    booted = Kernel(release, target, root / "usr/lib/modules" / release)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        content = Path(folder)
        for name in ("bin", "dev", "root", "modules"):
            (content / name).mkdir()
        shutil.copy2(root / "usr/bin/busybox", content / "bin/busybox")
        files = module_files(booted, _DRIVERS)
        for name, data in files:
            (content / f"modules/{name}.ko").write_bytes(data)
        (content / "modules/order").write_text("".join(f"{name}.ko\n" for name, _ in files))
        (content / "init").write_text(_INIT)
        (content / "init").chmod(0o755)
        pack(content, target)
