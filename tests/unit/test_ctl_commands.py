"""Every command of curlingctl against a fake daemon: what it prints, where, and with what it exits."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import frozen

from curling_fd import __version__, errors
from curling_fd.ctl import context
from curling_fd.ctl.exit_codes import ExitCode
from curling_fd.ctl.main import main
from curling_fd.varlink.listener import open_listener
from curling_fd.varlink.server import serve_connection
from tests.unit.ctl_fake import FakeDaemon, event, vm


@frozen
class Ran:
    """What one run of curlingctl left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


Ctl = Callable[..., Awaitable[Ran]]


@pytest.fixture
async def daemon(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[FakeDaemon]:
    fake = FakeDaemon(str(tmp_path / "control.sock"))
    handler = partial(serve_connection, service=fake.service())
    nursery.start_soon(partial(trio.serve_listeners, handler, [open_listener(fake.path)]))
    yield fake
    nursery.cancel_scope.cancel()


@pytest.fixture
def ctl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Ctl:
    async def run(*arguments: str) -> Ran:
        line = ["--socket", str(tmp_path / "control.sock"), *arguments]
        with trio.fail_after(60):
            code = await trio.to_thread.run_sync(main, line, abandon_on_cancel=True)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


async def test_list_shows_states_and_numbers_with_units(daemon: FakeDaemon, ctl: Ctl) -> None:
    ran = await ctl("list")
    assert (ran.code, ran.err) == (0, "")
    header, db1, idle, mail1, _, web = ran.lines
    assert header.split() == ["NAME", "ROLE", "STATE", "ENGINE", "PEER", "CKPT/S", "STOP", "LAG", "REASON"]
    assert " ".join(db1.split()) == "db1 primary protected incremental host-b:9271 21.3 1.04 ms 23 ms -"
    assert " ".join(idle.split()) == "idle none idle - host-b:9271 - - - -"
    assert mail1.endswith("the link to the other host was lost")
    assert web.split()[:3] == ["web", "backup", "suspect"]


async def test_list_as_json_is_one_document_as_the_daemon_sent_it(daemon: FakeDaemon, ctl: Ctl) -> None:
    ran = await ctl("list", "--json")
    assert ran.document == {"vms": list(daemon.vms.values())}


async def test_list_of_names_is_for_scripts(daemon: FakeDaemon, ctl: Ctl) -> None:
    assert (await ctl("list", "--names")).lines == ["db1", "idle", "mail1", "mail2", "web"]


async def test_an_empty_list_says_what_to_do(daemon: FakeDaemon, ctl: Ctl) -> None:
    daemon.vms.clear()
    ran = await ctl("list")
    assert ran.code == 0
    assert "/etc/curling/vms" in ran.out
    assert (await ctl("--json", "list")).document == {"vms": []}


async def test_show_tells_everything(daemon: FakeDaemon, ctl: Ctl) -> None:
    ran = await ctl("show", "db1")
    assert ran.code == 0
    assert ran.lines[0] == "db1"
    rows = {line[2:16].strip(): line[16:] for line in ran.lines[1:]}
    assert rows["state"] == "protected"
    assert rows["engine"] == "incremental (x-colo works)"
    assert rows["QEMU"] == "11.1.3, accelerator kvm"
    assert rows["generation"] == "4, arbiter manual"
    assert rows["memory"] == "4 GiB"
    assert rows["checkpoints"] == "18,233 taken, 18,232 committed, 21.3 a second"
    assert rows["stop time"] == "1.2 ms last, 1.04 ms median, 3.4 ms 99th percentile"
    assert rows["pages"] == "1,230 last, 228 median"
    assert rows["data"] == "1 MiB last, 3 GiB in all"
    assert rows["lag"] == "23 ms"
    assert "last failover" not in rows


async def test_show_takes_a_unique_beginning_of_a_name(daemon: FakeDaemon, ctl: Ctl) -> None:
    assert (await ctl("show", "d", "--json")).document["vm"]["name"] == "db1"


async def test_an_ambiguous_beginning_names_the_candidates(daemon: FakeDaemon, ctl: Ctl) -> None:
    ran = await ctl("show", "mail")
    assert (ran.code, ran.out) == (ExitCode.NO_SUCH_VM, "")
    assert "mail1 and mail2" in ran.err


async def test_an_unknown_name_is_told_with_the_nearest(daemon: FakeDaemon, ctl: Ctl) -> None:
    ran = await ctl("show", "bd1")
    assert (ran.code, ran.out) == (ExitCode.NO_SUCH_VM, "")
    assert ran.err.startswith("curlingctl: This host knows no VM 'bd1'.\n  What to do: Did you mean db1?")


async def test_an_error_as_json_is_a_document_on_standard_output(daemon: FakeDaemon, ctl: Ctl) -> None:
    ran = await ctl("show", "bd1", "--json")
    assert (ran.code, ran.err) == (ExitCode.NO_SUCH_VM, "")
    assert set(ran.document) == {"error", "text", "remedy", "facts"}
    assert ran.document["error"] == "NoSuchVm"
    assert ran.document["facts"] == {"name": "bd1", "nearest": "db1"}


async def test_protect_shows_the_first_pass_as_lines_where_there_is_no_terminal(
    daemon: FakeDaemon, ctl: Ctl
) -> None:
    ran = await ctl("protect", "idle")
    assert (ran.code, ran.err) == (0, "")
    # A line for each tenth, so none for 4 %.
    percents = [line.partition("(")[2].partition(" %")[0] for line in ran.lines[:-1]]
    assert percents == ["0", "25", "50", "100"]
    assert ran.lines[1].startswith("idle: first pass: 25 MiB of 100 MiB (25 %)")
    assert ran.lines[-1] == "idle is protected, primary here"


async def test_protect_as_json_is_the_vm_in_the_end(daemon: FakeDaemon, ctl: Ctl) -> None:
    ran = await ctl("protect", "idle", "--json")
    assert ran.document["vm"]["state"] == "protected"


async def test_protecting_twice_is_refused(daemon: FakeDaemon, ctl: Ctl) -> None:
    ran = await ctl("protect", "db1")
    assert ran.code == ExitCode.REFUSED
    assert "db1 is under protection already" in ran.err


async def test_protection_that_did_not_come_about_is_a_failure(daemon: FakeDaemon, ctl: Ctl) -> None:
    async def protect(request: Any) -> Any:
        return {"vm": vm("idle", state="unprotected", reason="the backup went away")}

    daemon_service = daemon.service()
    daemon_service.methods["Protect"] = protect  # type: ignore[index]
    path = str(Path(daemon.path).with_name("other.sock"))
    async with trio.open_nursery() as nursery:
        handler = partial(serve_connection, service=daemon_service)
        nursery.start_soon(partial(trio.serve_listeners, handler, [open_listener(path)]))
        ran = await ctl("--socket", path, "protect", "idle")
        nursery.cancel_scope.cancel()
    assert ran.code == ExitCode.FAILED
    assert ran.out == "idle is unprotected: the backup went away\n"


async def test_pause_and_resume_say_what_the_guest_does(daemon: FakeDaemon, ctl: Ctl) -> None:
    assert (await ctl("pause", "db1")).out == "db1 is protected, paused, primary here\n"
    assert (await ctl("resume", "db1")).out == "db1 is protected, primary here\n"
    assert (await ctl("pause", "db1", "--json")).document["vm"]["paused"] is True


@pytest.mark.parametrize("command", ["failover", "switch", "unprotect"])
async def test_what_cannot_be_undone_is_refused_where_nobody_can_be_asked(
    daemon: FakeDaemon, ctl: Ctl, command: str
) -> None:
    ran = await ctl(command, "web")
    assert (ran.code, ran.out) == (ExitCode.USAGE, "")
    assert "Add --confirm web" in ran.err
    assert daemon.calls == []


@pytest.mark.parametrize("command", ["failover", "switch", "unprotect"])
async def test_a_confirmation_must_name_the_vm_in_full(daemon: FakeDaemon, ctl: Ctl, command: str) -> None:
    for wrong in ("db1", "we", ""):
        ran = await ctl(command, "web", "--confirm", wrong)
        assert ran.code == ExitCode.USAGE
        assert "add --confirm web" in ran.err
    assert [method for method, _ in daemon.calls] == ["Show"] * 3


async def test_failover_goes_ahead_when_confirmed(daemon: FakeDaemon, ctl: Ctl) -> None:
    ran = await ctl("failover", "we", "--confirm", "web")
    assert (ran.code, ran.err) == (0, "")
    assert ran.lines == ["web is active, primary here", "The guest ran 43 ms after the decision."]
    assert daemon.calls[-1] == ("Failover", {"name": "web", "force": False})
    shown = (await ctl("show", "web")).out
    assert "detected after 1.01 s, guest running 43 ms later" in shown


async def test_failover_while_the_primary_lives_needs_force(daemon: FakeDaemon, ctl: Ctl) -> None:
    daemon.vms["web"]["state"] = "standby"
    ran = await ctl("failover", "web", "--confirm", "web")
    assert ran.code == ExitCode.REFUSED
    assert "it was heard 34 ms ago" in ran.err
    assert "failover web --force" in ran.err
    assert (await ctl("failover", "web", "--confirm", "web", "--force", "--json")).document["vm"][
        "state"
    ] == "active"


async def test_failover_on_the_primary_points_at_the_other_host(daemon: FakeDaemon, ctl: Ctl) -> None:
    ran = await ctl("failover", "db1", "--confirm", "db1")
    assert ran.code == ExitCode.REFUSED
    assert "this host is primary for db1" in ran.err


async def test_switch_shows_its_progress(daemon: FakeDaemon, ctl: Ctl) -> None:
    ran = await ctl("switch", "db1", "--confirm", "db1")
    assert ran.code == 0
    assert ran.lines[0].startswith("db1: last checkpoint: 0 B of 100 MiB")
    assert ran.lines[-1] == "db1 is filling, backup here"


async def test_unprotect_goes_ahead_when_confirmed(daemon: FakeDaemon, ctl: Ctl) -> None:
    ran = await ctl("unprotect", "db1", "--confirm", "db1")
    assert (ran.code, ran.out) == (0, "db1 is idle\n")
    ran = await ctl("unprotect", "db1", "--confirm", "db1")
    assert ran.code == ExitCode.REFUSED


async def test_watch_prints_rows_where_there_is_no_terminal(daemon: FakeDaemon, ctl: Ctl) -> None:
    ran = await ctl("watch", "--count", "2", "--interval", "200ms")
    assert ran.code == 0
    assert ran.lines[0].split()[:5] == ["TIME", "NAME", "ROLE", "STATE", "ENGINE"]
    assert len(ran.lines) == 1 + 2 * len(daemon.vms)
    assert "1.2 / 1.0 / 3.4" in ran.lines[1]
    assert "1,230" in ran.lines[1]
    start = ran.lines[0].index("ROLE")
    assert {line[start:].split()[0] for line in ran.lines[1:]} == {"primary", "none", "backup"}
    assert daemon.calls == [("Watch", {"interval_ms": 200})]
    await daemon.cancelled.wait()


async def test_watch_as_json_is_a_line_for_each_update(daemon: FakeDaemon, ctl: Ctl) -> None:
    ran = await ctl("watch", "db1", "--count", "3", "--json")
    assert len(ran.lines) == 3
    for line in ran.lines:
        assert json.loads(line)["vms"] == [daemon.vms["db1"]]
    assert daemon.calls == [("Watch", {"interval_ms": 1000, "name": "db1"})]


async def test_watch_of_nothing_says_so(daemon: FakeDaemon, ctl: Ctl) -> None:
    daemon.vms.clear()
    assert (await ctl("watch", "--count", "1")).lines[1].endswith("no VMs")


async def test_watch_shows_progress_in_place_of_a_reason(daemon: FakeDaemon, ctl: Ctl) -> None:
    made = {"phase": "first pass", "done_bytes": 1 << 20, "total_bytes": 4 << 20}
    daemon.vms = {"a": vm("a", state="syncing", progress=made)}
    assert (await ctl("watch", "--count", "1")).lines[1].endswith("first pass: 1 MiB of 4 MiB (25 %)")


async def test_events_are_lines_with_date_and_age(daemon: FakeDaemon, ctl: Ctl) -> None:
    ran = await ctl("events", "--count", "3")
    assert ran.code == 0
    assert [line.rpartition("  ")[2] for line in ran.lines] == [f"committed: number {n}" for n in (1, 2, 3)]
    assert "2023-11-1" in ran.lines[0]
    assert "days ago)  db1" in ran.lines[0]
    assert daemon.calls == [("Events", {"since": 0})]


async def test_events_go_on_from_a_number_and_are_json_lines(daemon: FakeDaemon, ctl: Ctl) -> None:
    ran = await ctl("events", "--since", "1", "--count", "2", "--json")
    assert [json.loads(line) for line in ran.lines] == [event(2), event(3)]


async def test_new_events_only(daemon: FakeDaemon, ctl: Ctl) -> None:
    assert (await ctl("events", "--new", "--count", "0")).out == ""
    assert (await ctl("events", "--new", "--since", "1")).code == ExitCode.USAGE


async def test_events_cannot_drive_the_terminal(daemon: FakeDaemon, ctl: Ctl) -> None:
    daemon.events = [event(1, message="\x1b[2J\x9b evil")]
    out = (await ctl("events", "--count", "1")).out
    assert "\x1b" not in out
    assert "\x9b" not in out
    assert "evil" in out


async def test_doctor_orders_by_severity_and_tells_the_remedies(daemon: FakeDaemon, ctl: Ctl) -> None:
    ran = await ctl("doctor")
    assert ran.code == ExitCode.FAILED
    assert [line.split()[0] for line in ran.lines[1:4]] == ["ok", "warning", "failed"]
    assert "  db1, peer: Start curlingd there." in ran.lines
    assert ran.lines[-1] == "1 failed, 1 with a warning, 1 ok."


async def test_doctor_is_content_with_warnings(daemon: FakeDaemon, ctl: Ctl) -> None:
    daemon.checks = daemon.checks[1:]
    assert (await ctl("doctor", "web")).code == 0
    assert daemon.calls == [("Doctor", {"name": "web"})]


async def test_doctor_as_json_is_the_checks(daemon: FakeDaemon, ctl: Ctl) -> None:
    ran = await ctl("doctor", "--json")
    assert ran.code == ExitCode.FAILED
    assert ran.document == {"checks": daemon.checks}


async def test_doctor_with_nothing_to_check(daemon: FakeDaemon, ctl: Ctl) -> None:
    daemon.checks = []
    assert (await ctl("doctor")).out == "0 failed, 0 with a warning, 0 ok.\n"


COMMANDS = [
    ("list",),
    ("show", "a"),
    ("protect", "a"),
    ("unprotect", "a", "--confirm", "a"),
    ("failover", "a", "--confirm", "a"),
    ("switch", "a", "--confirm", "a"),
    ("pause", "a"),
    ("resume", "a"),
    ("watch",),
    ("events",),
    ("doctor",),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
async def test_without_a_daemon_every_command_says_how_to_start_it(
    ctl: Ctl, command: tuple[str, ...]
) -> None:
    ran = await ctl(*command)
    assert (ran.code, ran.out) == (ExitCode.NO_DAEMON, "")
    assert "systemctl start curlingd" in ran.err
    ran = await ctl(*command, "--json")
    assert ran.code == ExitCode.NO_DAEMON
    assert ran.document["error"] == "DaemonUnreachable"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
async def test_without_the_right_every_command_says_which_group(
    ctl: Ctl, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(path: str) -> trio.SocketStream:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(trio, "open_unix_socket", refuse)
    ran = await ctl(*command)
    assert ran.code == ExitCode.NOT_PERMITTED
    assert f"lacks the right for '{command[0]}'" in ran.err
    assert "usermod -aG curling" in ran.err


@pytest.mark.parametrize("command", [("list",), ("show", "db1"), ("unprotect", "db1", "--confirm", "db1")])
async def test_a_daemon_that_hangs_is_not_waited_for_without_end(
    daemon: FakeDaemon, ctl: Ctl, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr(context, "PATIENCE", 0.0)
    daemon.hangs = True
    ran = await ctl(*command)
    assert ran.code == ExitCode.NO_DAEMON
    assert "it did not answer within" in ran.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.WritableDisk(("disk0",)), ExitCode.PRECHECK),
        (errors.MigrationBlocked(("State blocked by ivshmem",)), ExitCode.PRECHECK),
        (errors.PeerRefused("NotEnoughMemory", "no memory", "add some"), ExitCode.PRECHECK),
        (errors.PeerRefused("NotPermitted", "no", ""), ExitCode.PEER),
        (errors.PeerUnreachable("b:1", "timed out"), ExitCode.PEER),
        (errors.QmpBusy("/q"), ExitCode.QEMU),
        (errors.CheckpointTooLarge(1 << 30), ExitCode.CAPTURE),
        (errors.ArbiterUnavailable("not mounted"), ExitCode.ARBITER),
        (errors.GuestEnded("powered off"), ExitCode.ENDED),
        (errors.NotPermitted("protect", "curling", 1000), ExitCode.NOT_PERMITTED),
        (errors.ConfigError("/etc/x", "wrong"), ExitCode.CONFIG),
    ],
)
async def test_errors_of_the_daemon_have_codes_and_words(
    daemon: FakeDaemon, ctl: Ctl, error: errors.CurlingError, code: ExitCode
) -> None:
    daemon.raises = error
    ran = await ctl("protect", "idle")
    assert (ran.code, ran.out) == (code, "")
    assert str(error) in ran.err
    assert "What to do: " in ran.err
    assert (await ctl("protect", "idle", "--json")).document["error"] == type(error).__name__


async def test_all_that_a_standby_printed_is_shown(daemon: FakeDaemon, ctl: Ctl) -> None:
    daemon.raises = errors.StandbyFailed(
        "it exited with status 1", "qemu: warning\nqemu: \x1b[31mno such bridge\n"
    )
    err = (await ctl("protect", "idle")).err
    assert "    qemu: warning\n    qemu: \N{REPLACEMENT CHARACTER}[31mno such bridge\n  What to do:" in err


async def test_an_unexpected_error_of_the_daemon_is_told_and_is_no_traceback(
    daemon: FakeDaemon, ctl: Ctl
) -> None:
    daemon.raises = ZeroDivisionError("oh")  # type: ignore[assignment]
    ran = await ctl("list")
    assert ran.code == ExitCode.FAILED
    assert "journalctl" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "required: COMMAND"),
        (("lits",), "There is no command 'lits'."),
        (("lits",), "Did you mean list?"),
        (("show",), "required: NAME"),
        (("show", "a", "b"), "Unrecognized arguments: b"),
        (("list", "--name"), "Unrecognized arguments: --name"),
        (("watch", "--interval", "1"), "has no unit"),
        (("watch", "--interval", "1ms"), "1ms is not from 100ms to 1h"),
        (("watch", "--count", "-1"), "'-1' is not a whole number"),
        (("completion", "fish"), "invalid choice: 'fish'"),
    ],
)
async def test_a_wrong_command_line_is_one_sentence(ctl: Ctl, arguments: tuple[str, ...], said: str) -> None:
    ran = await ctl(*arguments)
    assert (ran.code, ran.out) == (ExitCode.USAGE, "")
    assert said in ran.err
    ran = await ctl(*arguments, "--json")
    assert ran.code == ExitCode.USAGE
    assert ran.document["error"] == "UsageError"


async def test_options_of_all_commands_stand_before_or_after_the_command(
    daemon: FakeDaemon, ctl: Ctl
) -> None:
    assert (await ctl("--json", "list")).out == (await ctl("list", "--json")).out
    assert (await ctl("--socket", "/nowhere", "list", "--socket", daemon.path)).code == 0


async def test_version_and_help(ctl: Ctl) -> None:
    assert (await ctl("--version")).out == f"curlingctl {__version__}\n"
    ran = await ctl("--help")
    assert ran.code == 0
    for code in ExitCode:
        assert f"{code:>5}  " in ran.out


@pytest.mark.parametrize("command", ["list", "failover", "check-config", "completion"])
async def test_every_command_has_help(ctl: Ctl, command: str) -> None:
    ran = await ctl(command, "--help")
    assert ran.code == 0
    assert ran.out.startswith(f"usage: curlingctl {command}")


async def test_check_config_says_ok_and_what_it_found(ctl: Ctl, tmp_path: Path) -> None:
    (tmp_path / "curlingd.toml").write_text("")
    (tmp_path / "vms").mkdir()
    for name in ("b", "a"):
        (tmp_path / "vms" / f"{name}.toml").write_text("")
    path = str(tmp_path / "curlingd.toml")
    assert await ctl("check-config", path) == Ran(0, f"OK: {path}, 2 VMs: a, b\n", "")
    assert (await ctl("check-config", path, "--json")).document == {
        "ok": True,
        "path": path,
        "vms": ["a", "b"],
    }


async def test_check_config_tells_everything_that_is_wrong(ctl: Ctl, tmp_path: Path) -> None:
    path = tmp_path / "curlingd.toml"
    path.write_text("lisen = 'a:1'\ninsecure = 1")
    ran = await ctl("check-config", str(path))
    assert (ran.code, ran.out) == (ExitCode.CONFIG, "")
    assert "lisen: unknown key" in ran.err
    assert "Did you mean listen?" in ran.err
    assert "insecure: 1 is not true or false" in ran.err
    document = (await ctl("check-config", str(path), "--json")).document
    assert document["error"] == "ConfigError"
    assert document["facts"]["key"] == "lisen"
    assert [problem["facts"]["key"] for problem in document["problems"]] == ["lisen", "insecure"]


async def test_completion_scripts_are_printed(ctl: Ctl) -> None:
    assert "_shtab_curlingctl curlingctl" in (await ctl("completion", "bash")).out
    assert (await ctl("completion", "zsh")).out.startswith("#compdef curlingctl")
    assert set((await ctl("completion", "bash", "--json")).document) == {"shell", "script"}


async def test_tune_says_what_was_to_be_changed_and_no_more(daemon: FakeDaemon, ctl: Ctl) -> None:
    result = await ctl("tune", "db1", "--longest-epoch", "50ms")
    assert result.code == 0
    assert daemon.calls[-1] == (
        "Tune",
        {"name": "db1", "longest_epoch": "50ms", "shortest_epoch": None, "output_limit": None},
    )
