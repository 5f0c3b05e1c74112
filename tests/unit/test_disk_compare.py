"""Offers, answers, digests: what differs is found, and nothing else is read or asked for."""

from __future__ import annotations

from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curling_fd.disk.compare import (
    BLOCK,
    CHUNK,
    FINE,
    Offer,
    Verdict,
    answer,
    block_digests,
    decode_answer,
    digest,
    zero_digest,
)
from curling_fd.errors import FrameError

SIZE = 10 * FINE + 512
SIZES = (4 * FINE, SIZE)


@st.composite
def disks(draw: st.DrawFn) -> bytes:
    """A disk of `SIZE` bytes of blocks that are alike often."""
    kinds = draw(st.lists(st.integers(0, 2), min_size=11, max_size=11))
    return b"".join(bytes([kind]) * FINE for kind in kinds)[:SIZE]


def digests(disk: bytes, offset: int, length: int, block: int) -> list[bytes]:
    end = offset + length
    return [digest(disk[at : min(at + block, end)]) for at in range(offset, end, block)]


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, int], ...]:
    found = []
    for _ in range(draw(st.integers(0, 4))):
        offset = draw(st.integers(0, SIZE - 1))
        found.append((offset, draw(st.integers(1, SIZE - offset))))
    return tuple(found)


def offer_of(disk: bytes, parts: tuple[tuple[int, int], ...], block: int) -> Offer:
    found = [mine for part in parts for mine in digests(disk, *part, block)]
    return Offer(1, block, parts, b"".join(found))


@given(disks(), disks(), ranges(), st.sampled_from((FINE, 2 * FINE, BLOCK)))
def test_the_answer_names_the_blocks_that_differ(
    source: bytes, copy: bytes, parts: tuple[tuple[int, int], ...], block: int
) -> None:
    offer = offer_of(source, parts, block)
    arrived = Offer.decode(offer.encode(), SIZES)
    assert arrived == offer
    said = answer(arrived, lambda *part: digests(copy, *part))
    wanted = dict(decode_answer(offer, said))
    for offset, length in offer.blocks():
        mine, theirs = copy[offset : offset + length], source[offset : offset + length]
        if mine == theirs:
            assert (offset, length) not in wanted
        else:
            empty = not any(mine)
            assert wanted[offset, length] is (Verdict.EMPTY if empty else Verdict.DIFFERS)


@given(st.binary(max_size=100) | ranges().map(lambda parts: offer_of(bytes(SIZE), parts, FINE).encode()))
def test_anything_is_an_offer_or_refused(wild: bytes) -> None:
    for payload in (wild, wild[:-1], wild + b"\0", wild[16:] + wild[:16]):
        try:
            offer = Offer.decode(payload, SIZES)
        except FrameError:
            continue
        assert offer.encode() == payload
        assert all(offset + length <= SIZES[offer.disk] for offset, length in offer.ranges)


@pytest.mark.parametrize(
    "offer",
    [
        Offer(2, FINE, (), b""),
        Offer(0, FINE - 1, (), b""),
        Offer(0, 2 * CHUNK, (), b""),
        Offer(0, FINE, ((0, 0),), b""),
        Offer(0, FINE, ((0, 4 * FINE + 1),), bytes(5 * 16)),
        Offer(0, FINE, ((0, FINE),), bytes(17)),
    ],
)
def test_an_offer_that_cannot_be_is_refused(offer: Offer) -> None:
    with pytest.raises(FrameError):
        Offer.decode(offer.encode(), SIZES)


@pytest.mark.parametrize("wrong", [b"", b"\0", b"\0\0\0", b"\0\3", b"\3\0"])
def test_an_answer_to_something_else_is_refused(wrong: bytes) -> None:
    with pytest.raises(FrameError):
        decode_answer(Offer(0, FINE, ((0, 2 * FINE),), bytes(32)), wrong)


@given(st.data(), st.sampled_from((1, 3)), st.sampled_from((64, CHUNK)))
def test_digests_are_those_of_the_content_however_its_holes_lie(
    data: st.DataObject, unit: int, chunk: int
) -> None:
    block = data.draw(st.sampled_from((7, 16)))
    lengths = data.draw(st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=6))
    extents = [(length * unit, zero) for length, zero in lengths]
    block *= unit
    start = data.draw(st.integers(0, 5))
    content = bytes(start) + b"".join(bytes(size) if zero else b"d" * size for size, zero in extents)
    read = [0]

    def read_into(view: memoryview, offset: int) -> None:
        view[:] = content[offset : offset + len(view)]
        read[0] += len(view)

    length = len(content) - start
    with mock.patch("curling_fd.disk.compare.CHUNK", chunk):
        found = list(block_digests(start, length, block, extents, read_into))
    assert found == digests(content, start, length, block)
    blocks = range(start, len(content), block)
    with_data = sum(
        min(block, len(content) - at) for at in blocks if any(content[at : min(at + block, len(content))])
    )
    assert read[0] == with_data, "what is known to be zeroes is not read"


def test_the_digest_of_zeroes_is_that_of_zeroes() -> None:
    assert zero_digest(BLOCK) == digest(bytes(BLOCK))
