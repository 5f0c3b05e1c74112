"""The backup's copies: real files, loop devices and qcow2 images, and all that cannot be one."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curling_fd import errors
from curling_fd.disk import locks
from curling_fd.disk.compare import FINE, digest
from curling_fd.disk.image import RawCopy, open_copy
from curling_fd.disk.log import TRIM, WRITE, ZERO, encode, scan
from curling_fd.disk.precheck import check_copy, open_checked
from curling_fd.disk.spec import Copy, CopySpec
from curling_fd.sentences import sentence

ODD = 3 * 65536 + 1000  # QEMU makes it a whole number of sectors
WHOLE = 3 * 65536 + 1024


def spec(path: Path, size: int = WHOLE, image_format: str = "raw") -> CopySpec:
    return CopySpec("drive0", str(path), image_format, size)


def run(*command: str | Path) -> str:
    return subprocess.run(
        [str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def make(path: Path, *, size: int = ODD, image_format: str = "raw", options: str = "") -> Path:
    run("qemu-img", "create", "-q", "-f", image_format, *options.split(), path, str(size))
    return path


def content(path: Path, image_format: str, tmp: Path) -> bytes:
    """What QEMU reads there."""
    raw = tmp / "content"
    run("qemu-img", "convert", "-f", image_format, "-O", "raw", path, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Callable[[int, int], Path]]:
    """Makes a block device of so many bytes, with sectors of so many."""
    made = []

    def loop(size: int, sector: int) -> Path:
        file = tmp_path / f"device-{len(made)}"
        with open(file, "wb") as image:
            image.truncate(size)
        made.append(run("losetup", "-b", str(sector), "-f", "--show", file).strip())
        return Path(made[-1])

    yield loop
    for device in made:
        run("blockdev", "--setrw", device)  # the next one of that number would be read-only too
        run("losetup", "-d", device)


@st.composite
def logs(draw: st.DrawFn, size: int = WHOLE, unit: int = 512) -> list[tuple[int, int, bytes | int]]:
    """Writes of whole units: where a disk's sectors are, a guest writes no less."""
    found: list[tuple[int, int, bytes | int]] = []
    for number in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, size // unit - 1))
        units = draw(st.integers(1, size // unit - start) | st.integers(1, min(4, size // unit - start)))
        kind = draw(st.sampled_from((WRITE, ZERO, TRIM)))
        data = bytes([number + 1]) * (units * unit)
        found.append((kind, start * unit, data if kind == WRITE else units * unit))
    return found


def log_of(writes: list[tuple[int, int, bytes | int]]) -> memoryview:
    log = b""
    for kind, offset, what in writes:
        if isinstance(what, bytes):
            log += encode(kind, 0, offset, len(what)) + what
        else:
            log += encode(kind, 0, offset, what)
    return memoryview(log)


def apply(copy: Copy, log: memoryview) -> None:
    copy.apply(scan(log, 0, len(log), [copy.spec.size]), log)


def model(disk: bytearray, writes: list[tuple[int, int, bytes | int]]) -> bytearray:
    for _, offset, what in writes:
        data = what if isinstance(what, bytes) else bytes(what)
        disk[offset : offset + len(data)] = data
    return disk


def digests(disk: bytes, block: int) -> list[bytes]:
    return [digest(disk[at : at + block]) for at in range(0, len(disk), block)]


@given(st.data())
@settings(max_examples=60)
@pytest.mark.parametrize("punch", [True, False])
def test_a_raw_copy_becomes_what_the_log_says_and_stays_it_when_that_is_done_again(
    tmp_path_factory: pytest.TempPathFactory, punch: bool, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("raw") / "copy"
    size = data.draw(st.sampled_from((ODD, WHOLE)))
    with open(path, "wb") as file:
        file.truncate(size)
    copy = RawCopy(spec(path), open_checked(spec(path)), punch=punch)
    disk = bytearray(WHOLE)
    for writes in data.draw(st.lists(logs(), max_size=3)):
        log = log_of(writes)
        if data.draw(st.booleans()):
            # The daemon died somewhere in the middle; the next one begins again.
            done = data.draw(st.integers(0, len(writes)))
            apply(copy, log_of(writes[:done]))
        apply(copy, log)
        model(disk, writes)
        block = data.draw(st.sampled_from((512, FINE, 65536)))
        assert list(copy.block_digests(0, WHOLE, block)) == digests(disk, block)
    copy.sync()
    copy.close()
    copy.close()
    # A disk whose last sector was never written may still end within it.
    assert path.read_bytes().ljust(WHOLE, b"\0") == disk
    assert size <= path.stat().st_size <= WHOLE
    check_copy(spec(path))
    path.unlink()


def test_zeroes_take_no_room(tmp_path: Path) -> None:
    copy = open_copy(spec(make(tmp_path / "copy", size=16 << 20), 16 << 20))
    apply(copy, log_of([(WRITE, 0, b"x" * (4 << 20)), (ZERO, 0, 3 << 20), (TRIM, 3 << 20, 1 << 20)]))
    copy.sync()
    copy.close()
    assert (tmp_path / "copy").stat().st_blocks == 0


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_block_device_is_a_copy_like_any_other(
    sector: int, loop: Callable[[int, int], Path], tmp_path: Path
) -> None:
    size = 64 * 4096
    device = loop(size, sector)
    copy = open_copy(spec(device, size))
    writes: list[tuple[int, int, bytes | int]] = [
        (WRITE, 0, b"a" * size),
        (ZERO, 512, 4096 * 3),
        (TRIM, 10 * 4096, 4096),
        (WRITE, 12 * 4096, b"b" * 4096),
        (ZERO, 20 * 4096 - 512, 1024),
    ]
    apply(copy, log_of(writes))
    disk = model(bytearray(size), writes)
    assert list(copy.block_digests(0, size, 4096)) == digests(disk, 4096)
    copy.sync()
    with pytest.raises(errors.CopyInUse):
        open_copy(spec(device, size))
    copy.close()
    assert device.read_bytes() == disk
    check_copy(spec(device, size))


def test_a_mounted_device_is_in_use_and_a_read_only_one_cannot_be_written(
    loop: Callable[[int, int], Path], tmp_path: Path
) -> None:
    size = 4 << 20
    device = loop(size, 512)
    run("mkfs.ext4", "-q", device)
    (tmp_path / "mnt").mkdir()
    run("mount", device, tmp_path / "mnt")
    try:
        with pytest.raises(errors.CopyInUse):
            check_copy(spec(device, size))
    finally:
        run("umount", tmp_path / "mnt")
    run("blockdev", "--setro", device)
    with pytest.raises(errors.CopyReadOnly):
        check_copy(spec(device, size))


class TestQcow2:
    @pytest.fixture
    def image(self, tmp_path: Path) -> Path:
        return make(tmp_path / "copy.qcow2", image_format="qcow2", size=WHOLE)

    def test_it_becomes_what_the_log_says(self, image: Path, tmp_path: Path) -> None:
        copy = open_copy(spec(image, image_format="qcow2"))
        writes: list[tuple[int, int, bytes | int]] = [
            (WRITE, 512, b"a" * 1536),
            (WRITE, 65536, b"b" * (2 * 65536 + 1024)),
            (ZERO, 66048, 512),
            (TRIM, 2 * 65536, 65536),
            (WRITE, 1024, b"c" * 512),
        ]
        disk = model(bytearray(WHOLE), writes)
        for _ in range(2):
            apply(copy, log_of(writes))
            copy.sync()
            for block in (4096, 65536):
                assert list(copy.block_digests(0, WHOLE, block)) == digests(disk, block)
        assert list(copy.block_digests(65536, 4096, 4096)) == [digest(disk[65536 : 65536 + 4096])]
        copy.close()
        copy.close()
        assert content(image, "qcow2", tmp_path) == disk
        check_copy(spec(image, image_format="qcow2"))
        assert "cluster leaks" not in run("qemu-img", "check", "-q", image)

    def test_while_it_is_open_nobody_else_can_write_to_it(self, image: Path) -> None:
        copy = open_copy(spec(image, image_format="qcow2"))
        try:
            with pytest.raises(errors.CopyInUse) as caught:
                check_copy(spec(image, image_format="qcow2"))
            assert "qemu-storage-da" in caught.value.holder
        finally:
            copy.close()

    def test_a_program_that_dies_is_a_copy_that_failed(self, image: Path) -> None:
        copy = open_copy(spec(image, image_format="qcow2"))
        copy._process.kill()  # type: ignore[attr-defined]
        with pytest.raises(errors.DiskCopyFailed):
            apply(copy, log_of([(WRITE, 0, b"a" * 512)]))
        with pytest.raises(errors.DiskCopyFailed):
            copy.sync()
        with pytest.raises(errors.DiskCopyFailed):
            list(copy.block_digests(0, 4096, 4096))
        copy.close()

    @pytest.mark.parametrize("program", ["/nowhere/qemu-storage-daemon", "/bin/false"])
    def test_a_program_that_does_not_start_is_said(self, image: Path, program: str) -> None:
        with pytest.raises(errors.CopyUnusable, match=program):
            open_copy(spec(image, image_format="qcow2"), program=program)

    def test_zeroes_free_their_clusters(self, tmp_path: Path) -> None:
        size = 8 << 20
        image = make(tmp_path / "thin.qcow2", image_format="qcow2", size=size)
        copy = open_copy(spec(image, size, "qcow2"))
        apply(copy, log_of([(WRITE, 0, b"a" * size), (ZERO, 0, size)]))
        copy.close()
        mapped = json.loads(run("qemu-img", "map", "--output=json", image))
        assert all(part["zero"] for part in mapped)
        assert image.stat().st_blocks * 512 < 2 << 20


def refused(kind: type[errors.CopyUnfit], wanted: CopySpec, *words: str) -> None:
    """`wanted` cannot be a copy, the remedy has those words, and what was there is as it was."""
    path = Path(wanted.path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(kind) as caught:
        open_copy(wanted)
    assert type(caught.value) is kind
    said = sentence(caught.value)
    assert wanted.path in said.text and wanted.disk in said.text
    for word in words:
        assert word in said.text + " " + said.remedy
    assert (path.read_bytes() if path.is_file() else None) == before


def test_a_copy_that_is_missing_is_said_with_the_command_that_makes_it(tmp_path: Path) -> None:
    for image_format in ("raw", "qcow2"):
        path = tmp_path / f"copy.{image_format}"
        command = f"qemu-img create -f {image_format} {path} {WHOLE}"
        refused(errors.CopyMissing, spec(path, image_format=image_format), f"'{command}'")
        run(*command.split())
        open_copy(spec(path, image_format=image_format)).close()
    refused(errors.CopyMissing, spec(Path("/dev/nowhere/lv")), "block device")


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("size", [WHOLE - 1024, WHOLE + 512])
def test_a_copy_of_another_size_is_said_with_the_command_that_mends_it(
    image_format: str, size: int, tmp_path: Path
) -> None:
    path = make(tmp_path / "copy", size=size, image_format=image_format)
    wanted = spec(path, image_format=image_format)
    how = "--shrink " if size > WHOLE else ""
    command = f"qemu-img resize {how}-f {image_format} {path} {WHOLE}"
    refused(errors.CopyWrongSize, wanted, f"'{command}'", str(size))
    run(*command.split())
    open_copy(wanted).close()


def test_an_image_of_another_format_is_refused(tmp_path: Path) -> None:
    raw = make(tmp_path / "raw")
    qcow2 = make(tmp_path / "qcow2", image_format="qcow2")
    vmdk = make(tmp_path / "vmdk", image_format="vmdk")
    refused(
        errors.CopyWrongFormat, spec(raw, image_format="qcow2"), "is raw and not qcow2", "qemu-img create"
    )
    refused(errors.CopyWrongFormat, spec(qcow2), "is qcow2 and not raw", "qemu-img create")
    refused(errors.CopyWrongFormat, spec(vmdk), "vmdk")
    refused(errors.CopyWrongFormat, spec(vmdk, image_format="qcow2"), "vmdk")
    refused(errors.CopyUnusable, spec(vmdk, image_format="vmdk"), "vmdk")


def test_a_raw_disk_on_which_the_guest_keeps_an_image_is_raw(tmp_path: Path) -> None:
    inner = make(tmp_path / "inner", image_format="qcow2")
    os.truncate(inner, WHOLE)
    open_copy(spec(inner)).close()


def test_images_whose_content_is_elsewhere_or_hidden_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "base", image_format="qcow2")
    backed = make(tmp_path / "backed", image_format="qcow2", options=f"-F qcow2 -b {tmp_path / 'base'}")
    refused(errors.CopyBacked, spec(backed, image_format="qcow2"), str(tmp_path / "base"), "rebase")
    data = make(tmp_path / "meta", image_format="qcow2", options=f"-o data_file={tmp_path / 'data'}")
    refused(errors.CopyUnusable, spec(data, image_format="qcow2"), "another file")
    corrupt = make(tmp_path / "corrupt", image_format="qcow2")
    with open(corrupt, "r+b") as file:
        file.seek(79)
        file.write(b"\x02")
    refused(errors.CopyUnusable, spec(corrupt, image_format="qcow2"), "corrupt")


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_an_image_that_another_qemu_writes_to_is_in_use(image_format: str, tmp_path: Path) -> None:
    path = make(tmp_path / "copy", image_format=image_format)
    wanted = spec(path, image_format=image_format)
    # qemu-io says when it has opened it, and holds it until its input ends.
    with subprocess.Popen(
        ["qemu-io", "-f", image_format, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None and other.stdout is not None
        other.stdin.write("length\n")
        other.stdin.flush()
        assert other.stdout.read(7)
        refused(errors.CopyInUse, wanted, "qemu-io", str(other.pid))
        other.stdin.close()
    open_copy(wanted).close()


def test_qemu_refuses_to_write_to_our_copy_and_may_read_it(tmp_path: Path) -> None:
    path = make(tmp_path / "copy", size=WHOLE)
    copy = open_copy(spec(path))
    refusal = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 512", path], stderr=subprocess.PIPE, text=True, check=False
    )
    assert refusal.returncode and 'Failed to get "write" lock' in refusal.stderr
    run("qemu-img", "info", path)
    copy.close()
    run("qemu-io", "-f", "raw", "-c", "write 0 512", path)


def test_a_copy_is_open_once(tmp_path: Path) -> None:
    path = make(tmp_path / "copy")
    copy = open_copy(spec(path))
    with pytest.raises(errors.CopyInUse):
        open_copy(spec(path))
    copy.close()
    open_copy(spec(path)).close()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    refused(errors.CopyUnusable, spec(tmp_path), "neither a file nor a block device")
    refused(errors.CopyUnusable, spec(Path("/dev/zero")), "neither a file nor a block device")
    (tmp_path / "file").write_bytes(b"")
    refused(errors.CopyUnusable, spec(tmp_path / "file" / "below"), "Not a directory")


def test_a_read_only_copy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "copy")
    real = os.open

    def read_only(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(errors.CopyReadOnly):
        open_copy(spec(path))


def test_a_copy_that_has_no_room_left_has_failed(tmp_path: Path) -> None:
    mount = tmp_path / "full"
    mount.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=64k", "none", mount)
    try:
        path = make(mount / "copy", size=WHOLE)
        copy = open_copy(spec(path))
        with pytest.raises(errors.DiskCopyFailed) as caught:
            apply(copy, log_of([(WRITE, 0, b"x" * WHOLE)]))
        assert caught.value.problem == os.strerror(errno.ENOSPC)
        copy.close()
    finally:
        run("umount", mount)


def test_a_file_system_without_locks_has_no_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(errno.EOPNOTSUPP, "")

    monkeypatch.setattr("fcntl.fcntl", refuse)
    assert locks.lock(0)
    assert locks.free(0)
