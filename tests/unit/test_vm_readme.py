"""README.md's ten-minute set-up is what the lab executes: who changes it sees here what is used."""

from __future__ import annotations

import shlex
from typing import cast

import pytest
from attrs import frozen

from tests.lab.guests import ServerGuest
from tests.vm import readme
from tests.vm.steps import GUEST_MACS, Machine, configuration, guest_command, tap_command


def test_every_block_of_commands_is_one_the_lab_knows() -> None:
    known = [
        "pip install",
        "nft add table",
        "systemctl enable",
        "ip tuntap add",
        "qemu-system-x86_64 -name",
        "curlingctl protect",
        "curlingctl failover",
    ]
    shell = [block.text for block in readme.blocks() if block.language == "sh"]
    assert [[words for words in known if words in text] for text in shell] == [[words] for words in known]


def test_the_files_of_both_hosts_are_taken_out_of_their_columns() -> None:
    alpha, beta = configuration(0), configuration(1)
    assert list(alpha) == list(beta)
    assert 'host_name = "alpha"\n' in alpha["/etc/curling/curlingd.toml"]
    assert 'listen = "192.0.2.2:9271"\n' in beta["/etc/curling/curlingd.toml"]
    assert 'qmp = "/run/vm/db1-curling.qmp"\n' in alpha["/etc/curling/vms/db1.toml"]
    assert beta["/etc/curling/vms/db1.toml"].startswith('peer = "192.0.2.1:9271"\n')


def test_a_replacement_of_what_readme_does_not_say_fails() -> None:
    with pytest.raises(LookupError, match="says nothing like"):
        readme.block("sh", "pip install", {"pip uninstall": "true"})


@frozen
class Nothing:
    """A guest that is made of nothing."""

    memory: str = "64M"

    def arguments(self) -> list[str]:
        return ["-kernel", "k", "-initrd", "i", "-append", "quiet"]


def test_a_second_card_is_added_to_readmes_and_both_are_the_kernels() -> None:
    machine = Machine(cast(ServerGuest, Nothing()), "servers", ("vnet0", "vnet1"), vhost=True)
    words = shlex.split(guest_command(machine))
    netdevs = [words[at + 1] for at, word in enumerate(words) if word == "-netdev"]
    assert netdevs == [
        "tap,id=net0,ifname=vnet0,script=no,downscript=no,vhost=on",
        "tap,id=net1,ifname=vnet1,script=no,downscript=no,vhost=on",
    ]
    cards = [word for word in words if word.startswith("virtio-net-pci")]
    wanted = [f"virtio-net-pci,netdev=net{number},mac={mac}" for number, mac in enumerate(GUEST_MACS)]
    assert cards == wanted
    assert words[words.index("-initrd") + 1] == "/mnt/lab/guest/servers"
    assert "vnet1" in tap_command("vnet1") and "vnet0" not in tap_command("vnet1")
