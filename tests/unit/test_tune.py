"""What can be changed of a VM while it is protected."""

from __future__ import annotations

import pytest

from curling_fd.errors import ConfigError
from curling_fd.service.config import VmConfig
from curling_fd.service.options import TUNABLE, tuned

DB1 = VmConfig(name="db1")


def test_values_are_written_as_in_the_file_and_the_rest_stays() -> None:
    changed = tuned(DB1, {"longest_epoch": "50ms", "output_limit": "1MiB"})
    assert (changed.longest_epoch, changed.output_limit) == (0.05, 1 << 20)
    assert changed.shortest_epoch == DB1.shortest_epoch


@pytest.mark.parametrize("key", TUNABLE)
def test_nonsense_is_refused_with_the_key(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tuned(DB1, {key: "soon"})
    assert caught.value.key == key


def test_the_shortest_epoch_is_no_longer_than_the_longest() -> None:
    with pytest.raises(ConfigError) as caught:
        tuned(DB1, {"longest_epoch": "1ms"})
    assert caught.value.key == "shortest_epoch"
