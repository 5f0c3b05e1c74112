"""The initramfs of the server guest: the lab's Linux guest with real servers beside its own program.

    22    dropbear   root, by the key in `Servers.identity`
    80    busybox's httpd   /data is `content`; /cgi-bin/sum answers the SHA-256 of what is posted
    6379  redis      kept in memory only

All of them over IPv4 and IPv6. Programs and their libraries are out of this distribution's packages; what is
only known when it boots, its addresses, is on the kernel's command line (see servers.sh).
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from pathlib import Path

from attrs import frozen

from .cache import digest, made
from .debs import find_library, run, unpacked
from .initramfs import SOURCES, base_tree, pack
from .kernel import Kernel

SSH, HTTP, REDIS = 22, 80, 6379

#: Known to the clients as this, whatever address they take.
HOST_NAME = "server-guest"

CONTENT_BYTES = 8 << 20

_HERE = Path(__file__).parent
_PROGRAMS = {
    "redis-server": ("redis-tools", "usr/bin/redis-check-rdb"),  # told what to be by its name
    "dropbear": ("dropbear-bin", "usr/sbin/dropbear"),
    "dropbearkey": ("dropbear-bin", "usr/bin/dropbearkey"),
}
_LOADER = "ld-linux-x86-64.so.2"


@frozen
class Servers:
    """`archive` boots; `identity` is root's private key, `known_hosts` says how the guest proves itself."""

    archive: Path
    identity: Path
    known_hosts: Path


def content(count: int = CONTENT_BYTES) -> bytes:
    """The first bytes of what the guest's HTTP server has: no part of it is like another."""
    return hashlib.shake_128(b"curling").digest(count)


def servers(kernel: Kernel) -> Servers:
    """The archive for `kernel` with its keys, made when missing."""
    sources = [*SOURCES, _HERE / "servers.sh", Path(__file__)]
    folder = made(f"servers/{kernel.release}-{digest(*sources)}", lambda target: _build(kernel, target))
    # A checkout of the cache by somebody else's hands may have opened it, and ssh refuses such a key.
    identity = folder / "identity"
    if identity.stat().st_mode & 0o077:
        identity.chmod(0o600)
    return Servers(folder / "initramfs.cpio", identity, folder / "known_hosts")


def _build(kernel: Kernel, target: Path) -> None:
    target.mkdir()
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        tree = Path(folder)
        base_tree(kernel, tree)
        for name in ("etc/dropbear", "lib64", "lib", "root/.ssh", "tmp", "www/cgi-bin"):
            (tree / name).mkdir(parents=True)
        for private in ("root", "root/.ssh"):
            (tree / private).chmod(0o700)
        (tree / "lib64" / _LOADER).symlink_to(f"/lib/{_LOADER}")
        (tree / "bin/sh").symlink_to("busybox")
        (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        (tree / "etc/group").write_text("root:x:0:\n")
        _install(tree, "servers", (_HERE / "servers.sh").read_bytes())
        for name, (package, path) in _PROGRAMS.items():
            _install(tree, f"bin/{name}", (unpacked(package) / path).read_bytes())
        _add_libraries(tree)
        _make_keys(tree, target)
        (tree / "www/data").write_bytes(content())
        pack(tree, target / "initramfs.cpio")


def _install(tree: Path, name: str, program: bytes) -> None:
    (tree / name).write_bytes(program)
    (tree / name).chmod(0o755)


def _add_libraries(tree: Path) -> None:
    """All that the programs need and what these need, out of their packages."""
    packages = {package for package, _ in _PROGRAMS.values()}
    wanted = [_LOADER, *(name for program in _PROGRAMS for name in _needed(tree / "bin" / program))]
    while wanted:
        name = wanted.pop()
        if not (tree / "lib" / name).exists():
            _install(tree, f"lib/{name}", find_library(name, packages).read_bytes())
            wanted += _needed(tree / "lib" / name)


def _needed(program: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", run(["readelf", "-d", str(program)]))


def _make_keys(tree: Path, target: Path) -> None:
    """A key for the server and one for its client, both of this archive alone."""
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(target / "identity")])
    (tree / "root/.ssh/authorized_keys").write_text((target / "identity.pub").read_text())
    (tree / "root/.ssh/authorized_keys").chmod(0o600)
    # With the libraries that it has in the guest: this machine may have none of them.
    command = [
        str(tree / "lib" / _LOADER),
        "--library-path",
        str(tree / "lib"),
        str(tree / "bin/dropbearkey"),
    ]
    said = run([*command, "-t", "ed25519", "-f", str(tree / "etc/dropbear/key")])
    (public,) = re.findall(r"^ssh-ed25519 \S+", said, re.MULTILINE)
    (target / "known_hosts").write_text(f"{HOST_NAME} {public}\n")
