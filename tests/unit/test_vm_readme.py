"""README.md's ten-minute set-up is what the lab executes: who changes it sees here what is used."""

from __future__ import annotations

import pytest

from tests.vm import readme
from tests.vm.steps import configuration


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
