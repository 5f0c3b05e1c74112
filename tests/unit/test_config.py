"""The configuration: what the files may say, and what is said about those that may not."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curling_fd import errors
from curling_fd.errors import ConfigError
from curling_fd.network.words import GuestAddress, HostAddress, Route
from curling_fd.sentences import sentence
from curling_fd.service import config
from curling_fd.service.config import DaemonConfig, NetworkConfig, StandbyConfig, VmConfig, examine, load
from curling_fd.service.config_keys import Address

ROOT = Path(__file__).parents[2]


def write(directory: Path, files: Mapping[str, str]) -> Path:
    """Write `files` under `directory` and return the path of curlingd.toml."""
    for name, text in {"curlingd.toml": "", **files}.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory / "curlingd.toml"


def problem(directory: Path, files: Mapping[str, str]) -> ConfigError:
    """The one thing that is wrong with `files`."""
    read, problems = examine(write(directory, files))
    assert read is None
    (only,) = problems
    assert str(only).endswith(".")
    return only


def test_empty_files_give_the_defaults(tmp_path: Path) -> None:
    read = load(write(tmp_path, {"vms/db1.toml": ""}))
    assert read.daemon == DaemonConfig()
    assert read.daemon.listen == Address("127.0.0.1", 9271)
    assert read.daemon.heartbeat_interval == 0.1
    assert read.vms == {"db1": VmConfig("db1")}
    assert read.vms["db1"].max_checkpoint == 1 << 30
    assert read.vms["db1"].standby == StandbyConfig()
    assert read.vms["db1"].network == NetworkConfig()
    assert read.vms["db1"].network.announce == (0, 0.05, 0.15, 0.35, 0.75, 1.5, 3)


def test_every_key_can_be_set(tmp_path: Path) -> None:
    daemon = """
        host_name = "host-a"
        listen = "[::1]:9000"
        control_socket = "/tmp/c.sock"
        control_group = "staff"
        state_directory = "/tmp/state"
        runtime_directory = "/tmp/run"
        insecure = true
        heartbeat_interval = "20ms"
        failure_timeout = "300ms"
    """
    vm = """
        qmp = "/run/db1.qmp"
        peer = "host-b:9271"
        engine = "snapshot"
        arbiter = "file"
        arbiter_directory = "/srv/arbiter"
        longest_epoch = "1s"
        shortest_epoch = "0ms"
        max_checkpoint = 1048576
        buffers = 8
        shared_disks = ["disk0"]
        scratch_disks = ["disk1", "disk2"]
        autostart = true
        [standby]
        qemu = "/opt/qemu"
        extra_args = ["-S"]
        replace = { "/a" = "/b" }
        [network]
        bridge = "br0"
        bridges = { "vmbr1" = "br1" }
        addresses = ["198.51.100.9", "2001:DB8::9/64 mac 52-54-00-12-34-56 vlan 10"]
        learn = false
        host_addresses = ["192.0.2.80/24 dev br0 metric 50 label br0:vip", "2001:db8::80/128 dev br0"]
        routes = ["10.9.0.0/16 via 192.0.2.9 metric 50 table 100", "blackhole 10.0.0.0/8"]
        duplicate_address_detection = "0s"
        announce = ["0s", "1s"]
    """
    read = load(write(tmp_path, {"curlingd.toml": daemon, "vms/db1.toml": vm}))
    assert read.daemon == DaemonConfig(
        "host-a", Address("::1", 9000), "/tmp/c.sock", "staff", "/tmp/state", "/tmp/run", True, 0.02, 0.3
    )
    assert read.vms["db1"] == VmConfig(
        name="db1",
        qmp="/run/db1.qmp",
        peer=Address("host-b", 9271),
        engine="snapshot",
        arbiter="file",
        arbiter_directory="/srv/arbiter",
        longest_epoch=1.0,
        shortest_epoch=0.0,
        max_checkpoint=1048576,
        buffers=8,
        shared_disks=("disk0",),
        scratch_disks=("disk1", "disk2"),
        autostart=True,
        standby=StandbyConfig("/opt/qemu", ("-S",), {"/a": "/b"}),
        network=NetworkConfig(
            bridge="br0",
            bridges={"vmbr1": "br1"},
            addresses=(
                GuestAddress(ip_address("198.51.100.9")),
                GuestAddress(ip_address("2001:db8::9"), "52:54:00:12:34:56", 10),
            ),
            learn=False,
            host_addresses=(
                HostAddress(ip_address("192.0.2.80"), 24, "br0", metric=50, label="br0:vip"),
                HostAddress(ip_address("2001:db8::80"), 128, "br0"),
            ),
            routes=(
                Route(ip_network("10.9.0.0/16"), ip_address("192.0.2.9"), metric=50, table=100),
                Route(ip_network("10.0.0.0/8"), kind="blackhole"),
            ),
            duplicate_address_detection=0.0,
            announce=(0.0, 1.0),
        ),
    )


def test_drop_ins_are_read_in_the_order_of_their_names_and_the_last_word_counts(tmp_path: Path) -> None:
    files = {
        "curlingd.toml": 'host_name = "main"\ncontrol_group = "main"\ninsecure = true',
        "curlingd.toml.d/20-late.toml": 'host_name = "late"',
        "curlingd.toml.d/10-early.toml": 'host_name = "early"\ncontrol_group = "early"',
        "curlingd.toml.d/30-not.conf": "this is not read",
        "curlingd.toml.d/.hidden.toml": "nor is this",
    }
    daemon = load(write(tmp_path, files)).daemon
    assert (daemon.host_name, daemon.control_group, daemon.insecure) == ("late", "early", True)


def test_the_error_is_in_the_drop_in_that_made_it(tmp_path: Path) -> None:
    files = {
        "curlingd.toml": 'heartbeat_interval = "100ms"',
        "curlingd.toml.d/a.toml": 'heartbeat_interval = "260ms"',
    }
    error = problem(tmp_path, files)
    assert error.path == str(tmp_path / "curlingd.toml.d/a.toml")
    assert error.key == "heartbeat_interval"
    assert "quarter of failure_timeout (1 s)" in error.problem


@pytest.mark.parametrize(
    ("file", "line", "wrong", "nearest"),
    [
        ("curlingd.toml", 'lisen = "a:1"', "lisen", "listen"),
        ("curlingd.toml", 'control-socket = "/a"', "control-socket", "control_socket"),
        ("curlingd.toml", "frobnicate = 1", "frobnicate", None),
        ("vms/a.toml", 'engin = "auto"', "engin", "engine"),
        ("vms/a.toml", "[standby]\nqmeu = '/a'", "standby.qmeu", "standby.qemu"),
        ("vms/a.toml", "qemu = '/a'", "qemu", "standby.qemu"),
        ("vms/a.toml", "[standby]\npeer = 'a:1'", "standby.peer", "peer"),
        ("vms/a.toml", "[stanby]\nqemu = '/a'", "stanby", "standby"),
        ("vms/a.toml", "name = 'b'", "name", None),
        ("vms/a.toml", "[network]\nadresses = []", "network.adresses", "network.addresses"),
        ("vms/a.toml", "[network]\npeer = 'a:1'", "network.peer", "peer"),
        ("vms/a.toml", "[network]\nextra_args = []", "network.extra_args", "standby.extra_args"),
        ("vms/a.toml", "routes = []", "routes", "network.routes"),
        ("vms/a.toml", "[netwrk]\nbridge = 'a'", "netwrk", "network"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_right_one(
    tmp_path: Path, file: str, line: str, wrong: str, nearest: str | None
) -> None:
    error = problem(tmp_path, {file: line})
    assert (error.path, error.key, error.nearest) == (str(tmp_path / file), wrong, nearest)
    assert "unknown key" in error.problem
    if nearest:
        assert f"Did you mean {nearest}?" in sentence(error).remedy


@pytest.mark.parametrize(
    ("file", "line", "place"),
    [("curlingd.toml", 'qmp = "/a"', "the file of a VM"), ("vms/a.toml", 'listen = "a:1"', "curlingd.toml")],
)
def test_a_key_in_the_wrong_file_is_told_where_it_belongs(
    tmp_path: Path, file: str, line: str, place: str
) -> None:
    assert problem(tmp_path, {file: line}).problem == f"unknown key: it belongs in {place}"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('insecure = "yes"', '"yes" is not true or false'),
        ("insecure = 1", "1 is not true or false"),
        ("host_name = 3", "3 is not a name"),
        ('host_name = "-a"', "begin with a letter or digit"),
        ('host_name = ""', "1 to 64 letters"),
        ('control_socket = "run/c"', "'run/c' is not an absolute path"),
        ('control_socket = "/' + "x" * 107 + '"', "at most 107 bytes, this has 108"),
        ('state_directory = "/a\\u0000b"', "is not an absolute path"),
        ('control_group = ""', "is not the name of a group"),
        ("heartbeat_interval = 100", "100 is not a duration like"),
        ('heartbeat_interval = "100"', "has no unit"),
        ('heartbeat_interval = "1m"', "'m' is not a unit of time"),
        ('heartbeat_interval = "1ms"', "1ms is not from 10 ms to 10 s"),
        ('failure_timeout = "1h"', "1h is not from 100 ms to 5 min"),
        ('listen = "9271"', "'9271' is not HOST:PORT"),
        ('listen = "::1:9271"', "IPv6 address in brackets"),
        ('listen = "a:0"', "0 is not a port"),
        ('listen = "a:65536"', "65536 is not a port"),
        ('listen = "a b:1"', "is not HOST:PORT"),
        ("listen = {a = [1, true]}", "{a = [1, true]} is not"),
    ],
)
def test_a_wrong_value_of_the_daemon_is_refused(tmp_path: Path, line: str, said: str) -> None:
    error = problem(tmp_path, {"curlingd.toml": line})
    assert error.key == line.partition(" ")[0]
    assert said in error.problem


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('engine = "fast"', '"fast" is not one of auto, incremental, snapshot, precopy'),
        ("engine = []", "[] is not one of"),
        ("buffers = 1", "1 is not from 2 to 8"),
        ("buffers = 9", "9 is not from 2 to 8"),
        ("buffers = true", "true is not a whole number"),
        ("buffers = 2.5", "2.5 is not a whole number"),
        ('max_checkpoint = "1GB"', "may mean GiB"),
        ("max_checkpoint = 1024", "not from 1 MiB to 4 TiB"),
        ("max_checkpoint = -5", "-5 is negative"),
        ("max_checkpoint = 1.5", "1.5 is not a size"),
        ('shared_disks = "disk0"', '"disk0" is not a list of'),
        ("shared_disks = [1]", "1 is not one of the QEMU device or node names"),
        ("standby = 1", "write [standby]"),
        ('longest_epoch = "2min"', "not from 1 ms to 60 s"),
    ],
)
def test_a_wrong_value_of_a_vm_is_refused(tmp_path: Path, line: str, said: str) -> None:
    error = problem(tmp_path, {"vms/a.toml": line})
    assert error.path.endswith("vms/a.toml")
    assert error.key == line.partition(" ")[0]
    assert said in error.problem


@pytest.mark.parametrize(
    ("line", "wrong", "said"),
    [
        ('replace = ["a"]', "standby.replace", "is not a table"),
        ('replace = {"/a" = 1}', "standby.replace", "1 is not text"),
        ('extra_args = ""', "standby.extra_args", "is not a list"),
        ('qemu = "qemu"', "standby.qemu", "not an absolute path"),
        ('bridge = "a/b"', "network.bridge", '"a/b" is not the name of an interface'),
        ('bridge = "a234567890123456"', "network.bridge", "1 to 15 letters"),
        ("bridge = 1", "network.bridge", "1 is not the name of an interface"),
        ('bridges = ["br0"]', "network.bridges", "is not a table"),
        ('bridges = {"br0" = ""}', "network.bridges", '"" is not the name'),
        ('addresses = "10.0.0.1"', "network.addresses", "is not a list of addresses"),
        ("addresses = [1]", "network.addresses", "1 is not text like"),
        ('addresses = ["10.0.0.1", "10.0.0.1/8"]', "network.addresses", "10.0.0.1 is there twice"),
        ('host_addresses = ["10.0.0.1/8"]', "network.host_addresses", "add dev NAME"),
        ('routes = ["10.0.0.1/8 via 1.1.1.1"]', "network.routes", "the network is 10.0.0.0/8"),
        ("announce = 1", "network.announce", "1 is not a list of durations"),
        ('announce = ["0s", "0s"]', "network.announce", "0s is not later than 0s before it"),
        ('announce = ["2min"]', "network.announce", "not from 0 s to 60 s"),
        (f"announce = {[f'{n}ms' for n in range(33)]}", "network.announce", "at most 32"),
        ('duplicate_address_detection = "6s"', "network.duplicate_address_detection", "from 0 s to 5 s"),
        ('learn = "yes"', "network.learn", "is not true or false"),
    ],
)
def test_a_wrong_value_in_a_table_is_named_with_its_table(
    tmp_path: Path, line: str, wrong: str, said: str
) -> None:
    table = wrong.partition(".")[0]
    error = problem(tmp_path, {"vms/a.toml": f"[{table}]\n{line}"})
    assert error.key == wrong
    assert said in error.problem


@pytest.mark.parametrize(
    ("text", "wrong", "said"),
    [
        ('qmp = "/q"', "peer", "missing"),
        ("autostart = true", "autostart", "needs qmp"),
        ('peer = "127.0.0.1:9271"', "peer", "where this daemon itself listens"),
        ('arbiter = "file"', "arbiter_directory", "missing"),
        ('shortest_epoch = "1s"', "shortest_epoch", "1 s is more than longest_epoch (100 ms)"),
        ('shared_disks = ["a", "b"]\nscratch_disks = ["b"]', "scratch_disks", "b is in shared_disks too"),
    ],
)
def test_values_that_contradict_each_other_are_refused(
    tmp_path: Path, text: str, wrong: str, said: str
) -> None:
    error = problem(tmp_path, {"vms/a.toml": text})
    assert error.key == wrong
    assert said in error.problem


def test_a_heartbeat_may_be_a_quarter_of_the_timeout_and_no_more(tmp_path: Path) -> None:
    write(tmp_path, {"curlingd.toml": 'heartbeat_interval = "250ms"'})
    assert load(tmp_path / "curlingd.toml").daemon.heartbeat_interval == 0.25
    assert problem(tmp_path, {"curlingd.toml": 'failure_timeout = "399ms"'}).key == "failure_timeout"


def test_two_vms_cannot_have_one_monitor(tmp_path: Path) -> None:
    text = 'qmp = "/q"\npeer = "b:1"'
    error = problem(tmp_path, {"vms/a.toml": text, "vms/b.toml": text})
    assert error.path.endswith("b.toml")
    assert error.problem == "/q is the socket of a too"


@pytest.mark.parametrize("name", ["-a", "a b", "ä", "x" * 65, "a$"])
def test_a_file_whose_name_cannot_be_that_of_a_vm_is_refused(tmp_path: Path, name: str) -> None:
    error = problem(tmp_path, {f"vms/{name}.toml": ""})
    assert error.path.endswith(f"{name}.toml")
    assert "no name for a VM" in error.problem


def test_other_files_beside_those_of_the_vms_are_let_be(tmp_path: Path) -> None:
    assert list(load(write(tmp_path, {"vms/a.toml": "", "vms/a.toml~": "!", "vms/.a.toml": "!"})).vms) == [
        "a"
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a = \n", "is not TOML: Invalid value (at line 1, column 5)"),
        (b"a = 1\na = 2\n", "(at line 2"),
        (b"\xff", "is not UTF-8 (at byte 0)"),
    ],
)
def test_a_file_that_is_not_toml_is_named_with_the_line(tmp_path: Path, text: bytes, said: str) -> None:
    path = write(tmp_path, {})
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.path == str(path)
    assert said in caught.value.problem


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
        load(tmp_path / "curlingd.toml")
    (tmp_path / "curlingd.toml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path / "curlingd.toml")
    (tmp_path / "vms").write_text("")
    (tmp_path / "curlingd.toml").rmdir()
    (tmp_path / "curlingd.toml").write_text("")
    with pytest.raises(ConfigError, match="vms: cannot be read: Not a directory"):
        load(tmp_path / "curlingd.toml")


def test_at_the_default_place_the_file_may_be_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path / "curlingd.toml"))
    assert load().daemon == DaemonConfig()
    write(tmp_path, {"curlingd.toml.d/a.toml": "insecure = true"})
    (tmp_path / "curlingd.toml").unlink()
    assert load().daemon.insecure


def test_a_host_without_a_usable_name_needs_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "(none)")
    error = problem(tmp_path, {})
    assert error.key == "host_name"
    assert "(none)" in error.problem
    assert load(write(tmp_path, {"curlingd.toml": 'host_name = "a"'})).daemon.host_name == "a"


def test_everything_that_is_wrong_is_found_at_once_and_the_first_is_raised(tmp_path: Path) -> None:
    files = {"curlingd.toml": "insecure = 1\nx = 1", "vms/a.toml": "buffers = 0", "vms/b.toml": "["}
    path = write(tmp_path, files)
    read, problems = examine(path)
    assert read is None
    assert [(Path(error.path).name, error.key) for error in problems] == [
        ("curlingd.toml", "insecure"),
        ("curlingd.toml", "x"),
        ("a.toml", "buffers"),
        ("b.toml", None),
    ]
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert errors.facts(caught.value) == errors.facts(problems[0])


@settings(max_examples=200)
@given(st.text("[]{}=\"'abc.\n #0123_-:,\\", max_size=60) | st.text(max_size=30))
def test_any_text_is_a_configuration_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    directory = tmp_path_factory.mktemp("config")
    path = directory / "curlingd.toml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    read, problems = examine(path)
    assert (read is None) == bool(problems)


def test_an_address_is_written_as_it_is_read() -> None:
    assert str(Address("::1", 1)) == "[::1]:1"
    assert str(Address("host", 1)) == "host:1"


def test_the_reference_in_the_documents_is_what_the_classes_say() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == config.reference(), (
        "run: python -m curling_fd.service.config > docs/configuration.md"
    )
