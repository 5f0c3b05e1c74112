"""The second disk of a lab host: what is under test, as an administrator would have received it.

    /mnt/lab/checkout/      of the project: README's commands are run in here; its dist/ has the wheel
    /mnt/lab/wheels/        what the wheel depends on, for the hosts' Python
    /mnt/lab/guest/         kernel and initramfs of the guest, and that of the server guest
    /mnt/lab/agent.py ...   programs of the lab

Made anew in seconds when the project changes; the wheels it depends on are kept as long as pyproject.toml
asks for the same.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path

from attrs import frozen

from tests.lab.cache import digest, made
from tests.lab.debs import run
from tests.lab.initramfs import initramfs
from tests.lab.kernel import kernel
from tests.lab.servers import servers

from .image import in_tree, tree

ROOT = Path(__file__).resolve().parents[2]
_HERE = Path(__file__).parent
_PROGRAMS = ("agent.py", "follow.py")
_PYTHON = "3.13"

#: Compiled in the hosts' own distribution: there are no wheels of these.
_COMPILED = ("python-prctl",)


@frozen
class Payload:
    """`content` is the folder that `disk` was made of; `key` changes when it does."""

    key: str
    content: Path
    disk: Path


def payload() -> Payload:
    """The disk, made when missing."""
    booted = kernel()
    sources = [*_project(), *(_HERE / name for name in _PROGRAMS), Path(__file__)]
    names = [str(path.relative_to(ROOT)) for path in sources]
    guest = {
        "kernel": booted.image,
        "initramfs": initramfs(booted),
        "servers": servers(booted).archive,
    }
    # Each archive of the server guest has keys of its own, and a folder that is named by what made it.
    places = [f"{path.parent.name}/{path.name}" for path in guest.values()]
    key = digest(*names, *sources, wheels().name, *places)
    folder = made(f"vm/payload-{key}", lambda target: _make(target, guest))
    return Payload(key, folder / "content", folder / "disk.raw")


def wheels() -> Path:
    """The folder of the wheels the project depends on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = sorted(project["dependencies"])
    return made(f"vm/wheels-{digest(_PYTHON, *wanted, _COMPILE)}", lambda target: _collect(target, wanted))


def _project() -> list[Path]:
    """What of the checkout a host gets to see: what is in the wheel, and what README installs."""
    listed = [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")]
    for folder in ("curling_fd", "systemd", "docs", "selinux"):
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
        listed += [path for path in files if "__pycache__" not in path.parts]
    return sorted(listed)


def _make(target: Path, guest: dict[str, Path]) -> None:
    content, disk = target / "content", target / "disk.raw"
    checkout = content / "checkout"
    for path in _project():
        copy = checkout / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps"]
    run([*pip, "-w", str(checkout / "dist"), str(checkout)])
    shutil.copytree(wheels(), content / "wheels")
    (content / "guest").mkdir()
    for name, path in guest.items():
        shutil.copyfile(path, content / "guest" / name)
    for name in _PROGRAMS:
        shutil.copyfile(_HERE / name, content / name)
    # Large enough for its files and what ext4 needs itself, in whole sectors.
    size = sum(path.stat().st_size for path in content.rglob("*")) * 5 // 4 + (32 << 20)
    run(["truncate", "-s", str(size // 4096 * 4096), str(disk)])
    options = ["-L", "payload", "-m", "0", "-O", "^has_journal"]
    run(["mkfs.ext4", "-q", *options, "-d", str(content), str(disk)])


_COMPILE = """
root=$1; source=$2; target=$3
mount -t tmpfs tmpfs "$root/tmp"
mount -t proc proc "$root/proc"
tar -xf "$source" -C "$root/tmp"
chroot "$root" /usr/bin/env -i PATH=/usr/bin:/bin HOME=/tmp \
    sh -ec 'cd /tmp/*/ && python3 setup.py -q bdist_wheel -d /tmp/out'
cp "$root"/tmp/out/*.whl "$target/"
"""


def _collect(target: Path, wanted: list[str]) -> None:
    target.mkdir()
    names = {requirement: re.split(r"[<>=!~\[; ]", requirement)[0] for requirement in wanted}
    pip = [sys.executable, "-m", "pip", "download", "-q", "-d", str(target)]
    platforms = [
        f"--platform={name}_x86_64" for name in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")
    ]
    ready = [requirement for requirement, name in names.items() if name not in _COMPILED]
    run([*pip, f"--python-version={_PYTHON}", *platforms, "--only-binary=:all:", *ready])
    for requirement in wanted:
        if names[requirement] in _COMPILED:
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                pip[-1] = folder
                run([*pip, "--no-deps", "--no-binary=:all:", requirement])
                (source,) = Path(folder).iterdir()
                in_tree(tree(), _COMPILE, str(source), str(target))
