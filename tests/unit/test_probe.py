"""Which engine is chosen for which QEMU, and what is said about it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curling_fd.capture.probe import Choice, Version, choose, why_not_incremental
from curling_fd.errors import EngineUnavailable

WITH_COLO = frozenset({"events", "return-path", "x-colo", "background-snapshot"})
WITHOUT_COLO = WITH_COLO - {"x-colo"}
NO_USERFAULTFD = "Background-snapshot is not supported by host kernel"


def pick(
    version: Version = (11, 0, 0),
    accelerator: str = "kvm",
    *,
    wanted: str = "auto",
    capabilities: frozenset[str] = WITH_COLO,
    background_snapshot: str | None = None,
    unusable: dict[str, str] | None = None,
) -> Choice:
    return choose(
        wanted,
        version,
        accelerator,
        capabilities,
        background_snapshot=background_snapshot,
        unusable=unusable or {},
    )


@pytest.mark.parametrize(
    ("version", "accelerator", "engine", "word"),
    [
        ((7, 2, 22), "kvm", "incremental", "only what changed"),
        ((7, 2, 22), "tcg", "snapshot", "deadlocks in QEMU 7.2.22 under TCG"),
        ((9, 2, 4), "kvm", "incremental", "only what changed"),
        ((10, 0, 0), "kvm", "snapshot", "broken in QEMU 10.0.0"),
        ((10, 0, 2), "kvm", "snapshot", "broken in QEMU 10.0.2"),
        ((10, 0, 2), "tcg", "snapshot", "broken in QEMU 10.0.2"),
        ((10, 0, 6), "kvm", "snapshot", "broken in QEMU 10.0.6"),
        ((10, 0, 7), "kvm", "incremental", "only what changed"),
        ((10, 0, 13), "kvm", "incremental", "only what changed"),
        ((10, 0, 13), "tcg", "snapshot", "deadlocks in QEMU 10.0.13 under TCG"),
        ((10, 1, 0), "kvm", "snapshot", "broken in QEMU 10.1.0"),
        ((10, 1, 1), "kvm", "snapshot", "broken in QEMU 10.1.1"),
        ((10, 1, 2), "kvm", "snapshot", "broken in QEMU 10.1.2"),
        ((10, 1, 3), "kvm", "incremental", "only what changed"),
        ((10, 2, 0), "kvm", "incremental", "only what changed"),
        ((10, 2, 0), "tcg", "snapshot", "deadlocks in QEMU 10.2.0 under TCG"),
        ((11, 0, 0), "tcg", "incremental", "only what changed"),
        ((11, 1, 3), "kvm", "incremental", "only what changed"),
    ],
)
def test_auto_picks_the_best_engine_that_the_build_can_do(
    version: Version, accelerator: str, engine: str, word: str
) -> None:
    chosen = pick(version, accelerator)
    assert chosen.engine == engine
    assert word in chosen.reason
    assert (chosen.version, chosen.accelerator) == (version, accelerator)


def test_a_broken_build_is_told_where_it_is_fixed() -> None:
    assert "fixed in 10.0.7 and 10.1.3" in pick((10, 0, 2)).reason


@pytest.mark.parametrize("accelerator", ["kvm", "tcg"])
def test_a_build_without_colo_is_recognised_whatever_its_version(accelerator: str) -> None:
    chosen = pick((11, 1, 3), accelerator, capabilities=WITHOUT_COLO)
    assert chosen.engine == "snapshot"
    assert chosen.reason == "QEMU 11.1.3 is built without COLO"


def test_without_background_snapshots_precopy_is_the_last_resort_and_both_reasons_are_given() -> None:
    chosen = pick((10, 0, 2), background_snapshot=NO_USERFAULTFD)
    assert chosen.engine == "precopy"
    assert "broken in QEMU 10.0.2" in chosen.reason
    assert NO_USERFAULTFD in chosen.reason


def test_missing_background_snapshots_do_not_matter_where_colo_works() -> None:
    assert pick(background_snapshot=NO_USERFAULTFD).engine == "incremental"


def test_an_engine_that_failed_is_passed_over_and_its_failure_is_the_reason() -> None:
    first = pick(unusable={"incremental": "the migration ended `completed`"})
    assert (first.engine, first.reason) == ("snapshot", "the migration ended `completed`")
    second = pick(unusable={"incremental": "it ended", "snapshot": "it failed"})
    assert (second.engine, second.reason) == ("precopy", "it ended; it failed")


def test_when_every_engine_has_failed_precopy_is_tried_again() -> None:
    failed = {"incremental": "one", "snapshot": "two", "precopy": "three"}
    assert pick(unusable=failed).engine == "precopy"


@pytest.mark.parametrize("engine", ["incremental", "snapshot", "precopy"])
def test_an_engine_that_was_asked_for_is_used_even_if_it_failed_before(engine: str) -> None:
    chosen = pick(wanted=engine, unusable={engine: "it failed"})
    assert (chosen.engine, chosen.reason) == (engine, "asked for by the configuration")


@pytest.mark.parametrize(
    ("version", "accelerator", "capabilities", "word"),
    [
        ((10, 1, 1), "kvm", WITH_COLO, "broken in QEMU 10.1.1"),
        ((7, 2, 22), "tcg", WITH_COLO, "deadlocks"),
        ((11, 0, 0), "kvm", WITHOUT_COLO, "without COLO"),
    ],
)
def test_incremental_is_refused_where_it_cannot_work(
    version: Version, accelerator: str, capabilities: frozenset[str], word: str
) -> None:
    with pytest.raises(EngineUnavailable) as caught:
        pick(version, accelerator, wanted="incremental", capabilities=capabilities)
    assert caught.value.engine == "incremental"
    assert word in caught.value.why


def test_snapshot_is_refused_with_what_qemu_says() -> None:
    with pytest.raises(EngineUnavailable) as caught:
        pick(wanted="snapshot", background_snapshot=NO_USERFAULTFD)
    assert (caught.value.engine, caught.value.why) == ("snapshot", NO_USERFAULTFD)


@pytest.mark.parametrize(
    ("version", "needed"), [((7, 2, 22), False), ((10, 2, 9), False), ((11, 0, 0), True), ((12, 1, 0), True)]
)
def test_the_return_path_is_for_the_builds_that_need_it(version: Version, needed: bool) -> None:
    assert pick(version).return_path is needed


versions = st.tuples(st.integers(7, 13), st.integers(0, 3), st.integers(0, 30))


@given(versions, st.sampled_from(["kvm", "tcg"]), st.booleans(), st.none() | st.just(NO_USERFAULTFD))
def test_auto_always_finds_an_engine_and_gives_a_reason(
    version: Version, accelerator: str, colo: bool, background_snapshot: str | None
) -> None:
    capabilities = WITH_COLO if colo else WITHOUT_COLO
    chosen = pick(version, accelerator, capabilities=capabilities, background_snapshot=background_snapshot)
    assert chosen.reason
    works = why_not_incremental(version, accelerator, capabilities) is None
    assert (chosen.engine == "incremental") is works
    if not works:
        assert chosen.engine == ("precopy" if background_snapshot else "snapshot")


@given(versions)
def test_the_accelerator_never_helps_a_broken_build(version: Version) -> None:
    if why_not_incremental(version, "kvm", WITH_COLO):
        assert why_not_incremental(version, "tcg", WITH_COLO)
