"""Both hosts with SELinux enforcing: curlingd and its QEMUs in their own domains, and nothing is denied."""

from __future__ import annotations

import pytest

from tests.lab.bootsector import boot_sector

from .conftest import Labs
from .host import Host
from .image import Variant
from .lab import Lab
from .payload import ROOT
from .steps import VM
from .test_scenarios import main_pid, more_checkpoints, protected_between, runs_on

_DAEMON = "system_u:system_r:curlingd_t:s0"
_VM = "system_u:system_r:curling_vm_t:s0"
_SVIRT = "system_u:system_r:svirt_t:s0:c123,c456"
#: A service without a domain of its own, such as the lab's that starts the guest.
_OTHER = "system_u:system_r:initrc_t:s0"

#: What semodule changes becomes the image's own before: until then its files are links to those of the tree.
_POLICY = r"""
for store in etc/selinux var/lib/selinux; do
    cp -a /$store /$store.own
    rm -r /$store
    mv /$store.own /$store
done
sed -i 's/^SELINUX=.*/SELINUX=enforcing/' /etc/selinux/config
# However many denials there are, the kernel prints them all.
echo kernel.printk_ratelimit=0 >/etc/sysctl.d/lab.conf
# The second disk has no labels, and the reference policy does not know the shared folder's file system.
sed -Ei '/^LABEL=payload/s/ro,/ro,context=system_u:object_r:curling_image_t:s0,/' /etc/fstab
echo '(genfscon "9p" "/" (system_u object_r curling_arbiter_t ((s0) (s0))))' >/tmp/lab.cil
# libvirt is what may start a QEMU in svirt_t; here, systemd does.
echo '(allow init_t svirt_t (process (transition)))' >>/tmp/lab.cil
# What the lab does in a host, it does as an administrator who has logged in; only a shell leads there.
for unit in /etc/systemd/system/lab-*.service; do
    mkdir $unit.d
    { echo '[Service]'
      echo SELinuxContext=unconfined_u:unconfined_r:unconfined_t:s0
      sed -En "s|^ExecStart=(.*)|ExecStart=\nExecStart=/bin/sh -c 'exec \1'|p" $unit
    } >$unit.d/selinux.conf
done
mkdir /tmp/build
cp /tmp/sources/* /tmp/build
make -C /tmp/build install
semodule --install /tmp/lab.cil
rm -r /tmp/build /tmp/lab.cil
setfiles -F -e /proc -e /tmp/sources /etc/selinux/default/contexts/files/file_contexts /
"""

SELINUX = Variant(
    name="selinux",
    packages=("selinux-policy-default", "selinux-policy-dev", "policycoreutils", "make"),
    sources=ROOT / "selinux",
    finish=_POLICY,
    cmdline="security=selinux selinux=1 enforcing=1",
)


@pytest.fixture(scope="module")
def standing_lab(labs: Labs) -> Lab:
    """Two hosts that enforce, installed and configured by README."""
    return labs.set_up("selinux", SELINUX)


async def denials(host: Host) -> list[str]:
    """What SELinux denied on `host` so far, over all its boots, that has to do with Curling."""
    journal = "journalctl --sync && journalctl --quiet --output=cat --grep='avc:  denied .*curling' || :"
    return (await host.agent.run(journal)).stdout.splitlines()


async def domains(host: Host, program: str) -> list[str]:
    """The contexts of the processes of that name."""
    done = await host.agent.run(f"for pid in $(pgrep {program}); do cat /proc/$pid/attr/current; echo; done")
    return done.stdout.replace("\0", "").split()


async def test_both_hosts_enforce_and_curlingd_runs_in_its_own_domain(lab: Lab) -> None:
    await lab.ready()
    for host in lab.hosts:
        assert (await host.agent.run("getenforce")).stdout.strip() == "Enforcing"
        context = await host.agent.run(f"cat /proc/{await main_pid(host)}/attr/current")
        assert context.stdout.strip("\0\n") == _DAEMON
        await lab.ctl(host, "doctor")
    assert await domains(lab.alpha, "qemu-system") == [_OTHER]


async def test_a_vm_is_protected_restarts_included_and_survives_its_host_without_a_denial(lab: Lab) -> None:
    await lab.protected()
    assert await domains(lab.beta, "qemu-system") == [_VM]
    assert set(await domains(lab.alpha, "curling-guard")) == {_DAEMON}
    await lab.committed(lab.alpha, 10)
    for host in lab.hosts:
        old = await main_pid(host)
        await host.agent.run("systemctl restart curlingd")
        assert await main_pid(host) not in (0, old)
        await more_checkpoints(lab, lab.alpha)
    assert await denials(lab.alpha) == []

    await lab.lose_power(lab.alpha)
    await lab.wait_state(lab.beta, "active", "connecting", "unprotected")
    await runs_on(lab, lab.beta)
    assert await domains(lab.beta, "qemu-system") == [_VM]

    await lab.power_on(lab.alpha)
    await protected_between(lab, lab.beta, lab.alpha)
    await lab.ctl(lab.beta, "switch", VM, "--confirm", VM)
    await protected_between(lab, lab.alpha, lab.beta)
    await runs_on(lab, lab.alpha)
    assert await domains(lab.alpha, "qemu-system") == [_VM]

    for host in lab.hosts:
        assert (await host.agent.run("getenforce")).stdout.strip() == "Enforcing"
        assert await denials(host) == []


@pytest.mark.parametrize(
    ("name", "context", "image"),
    [("svirt", _SVIRT, "virt_content_t"), ("unit", _VM, "curling_image_t")],
    ids=["as libvirt does it", "by its unit"],
)
async def test_a_qemu_that_is_confined_already_is_protected_and_switched(
    lab: Lab, name: str, context: str, image: str
) -> None:
    await lab.ready()
    floppy = f"/srv/{name}.img"
    for host in lab.hosts:
        await host.agent.write(floppy, boot_sector(200, 10).read_bytes())
        await host.agent.run(f"chcon -t {image} {floppy}")
        vm = f'peer = "{lab.other(host).link_address}:9271"\n'
        vm += f'qmp = "/run/vm/{name}.qmp"\n' if host is lab.alpha else ""
        await host.agent.write(f"/etc/curling/vms/{name}.toml", vm)
        await host.agent.run("systemctl restart curlingd")
    qemu = (
        f"qemu-system-x86_64 -name {name} -machine pc,accel=kvm -cpu host -m 16M -nodefaults -display none "
        f"-drive if=floppy,format=raw,readonly=on,file={floppy} "
        f"-qmp unix:/run/vm/{name}.qmp,server=on,wait=off"
    )
    unit = f"--unit={name} -p SELinuxContext={context} -p StandardOutput=null"
    await lab.script(lab.alpha, f"mkdir -p /run/vm; systemd-run {unit} {qemu}")
    pid = (await lab.alpha.agent.run(f"systemctl show --value --property=MainPID {name}")).stdout.strip()
    assert (await lab.alpha.agent.run(f"cat /proc/{pid}/attr/current")).stdout.strip("\0\n") == context

    await lab.ctl(lab.alpha, "protect", name)
    shown = await lab.show(lab.alpha, name)
    assert (shown["state"], shown["engine"]) == ("protected", "incremental")
    await lab.ctl(lab.alpha, "switch", name, "--confirm", name)
    assert (await lab.show(lab.beta, name))["role"] == "primary"
    for host in lab.hosts:
        assert await denials(host) == []
        await host.agent.run(f"pkill -f '[/]srv/{name}.img' || :; rm /etc/curling/vms/{name}.toml")
        await host.agent.run("systemctl restart curlingd")


async def test_a_monitor_in_a_place_without_the_label_is_denied_and_the_denial_is_seen(lab: Lab) -> None:
    await lab.ready()
    before = len(await denials(lab.beta))
    bind = "import socket; socket.socket(socket.AF_UNIX).bind('/srv/outside.qmp')"
    await lab.beta.agent.run(["python3", "-c", bind])
    vm = f'qmp = "/srv/outside.qmp"\npeer = "{lab.alpha.link_address}:9271"\n'
    await lab.beta.agent.write("/etc/curling/vms/outside.toml", vm)
    await lab.beta.agent.run("systemctl restart curlingd")
    done = await lab.beta.agent.run("curlingctl doctor outside", check=False)
    assert done.status != 0 and "/srv/outside.qmp" in done.stdout + done.stderr
    denied = (await denials(lab.beta))[before:]
    assert len(denied) == 1
    assert "curlingd_t" in denied[0] and "tclass=sock_file permissive=0" in denied[0]
    await lab.beta.agent.run("rm /etc/curling/vms/outside.toml /srv/outside.qmp; systemctl restart curlingd")
