"""The replica: exactly one committed checkpoint, whatever it is given (I1)."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from curling_fd.errors import FrameError, StreamError
from curling_fd.link.frames import HEAD_SIZE, CheckpointHead
from curling_fd.replica.image import SMALL_BLOCKS_LIMIT, Replica
from curling_fd.system.buffers import Buffer
from curling_fd.vmstate.records import Block, RamLayout
from tests.unit.streams import (
    CONFIGURATION,
    PAGE,
    Pages,
    beginning,
    block_list,
    checkpoint,
    images,
    ram_section,
    written,
)

RAM = Block("pc.ram", 16 * PAGE)
BIOS = Block("pc.bios", 3 * PAGE)
ODD = Block("/rom@etc/odd", PAGE + 0x800)
REST = Block("/rom@etc/rest", 0x800)
LAYOUT = RamLayout((RAM, BIOS, ODD, REST), section_id=2)
DEVICE = b"\x04" + b"device state of checkpoint 1" + b"\x00"


def page(number: int) -> bytes:
    return struct.pack(">Q", number) * 512


FIRST = [(RAM, address * PAGE, page(address + 1)) for address in range(8)] + [
    (BIOS, 0, page(100)),
    (ODD, PAGE, page(101)),
    (RAM, 9 * PAGE, bytes(PAGE)),
]


class Subject:
    """A replica with its images, and what they should be."""

    def __init__(self, layout: RamLayout = LAYOUT) -> None:
        self.layout = layout
        self.ram = Buffer("test-ram", layout.blocks[0].size, prefault=0)
        self.replica = Replica([(layout.blocks[0], self.ram)])
        self.expected = images(layout.blocks)

    def bulk(self, data: bytes) -> None:
        self.replica.bulk(memoryview(data), len(data))

    def first_pass(self, pages: Pages = FIRST) -> None:
        self.bulk(beginning(self.layout) + ram_section(self.layout, pages))
        written(self.expected, pages)

    def take(self, sequence: int, pages: Pages, device: bytes = DEVICE) -> None:
        """Stage and commit a checkpoint."""
        payload = checkpoint(self.layout, pages, device)
        self.replica.commit(self.replica.stage(sequence, memoryview(payload), len(payload)))
        written(self.expected, pages)

    def content(self) -> dict[str, bytes]:
        return {block.name: bytes(self.replica.image(block.name)) for block in self.replica.blocks()}

    def check(self) -> None:
        assert self.content() == self.expected

    def close(self) -> None:
        self.replica.close()
        self.ram.close()


@pytest.fixture
def subject() -> Iterator[Subject]:
    made = Subject()
    yield made
    made.close()


def restored(replica: Replica) -> bytes:
    return b"".join(bytes(piece) for piece in replica.restore())


# The first pass


def test_a_first_pass_fills_the_images(subject: Subject) -> None:
    assert subject.replica.blocks() == ()
    subject.first_pass()
    assert subject.replica.blocks() == LAYOUT.blocks
    subject.check()
    assert subject.replica.committed == 0


def test_the_images_of_mapped_blocks_are_the_memory_they_were_given_as(subject: Subject) -> None:
    subject.first_pass()
    assert bytes(subject.ram.view) == bytes(subject.expected["pc.ram"])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 11])
def test_a_first_pass_may_come_in_any_pieces_of_whole_records(subject: Subject, size: int) -> None:
    subject.bulk(beginning(LAYOUT))
    for start in range(0, len(FIRST), size):
        subject.bulk(ram_section(LAYOUT, FIRST[start : start + size]))
    written(subject.expected, FIRST)
    subject.check()


def test_a_page_that_is_sent_again_is_the_later_one_also_when_it_became_zero(subject: Subject) -> None:
    subject.first_pass()
    again = [(RAM, 0, bytes(PAGE)), (RAM, PAGE, page(77)), (BIOS, 0, bytes(PAGE))]
    subject.bulk(ram_section(LAYOUT, again))
    written(subject.expected, again)
    subject.check()


def test_memory_that_was_never_written_takes_none_of_the_hosts(subject: Subject) -> None:
    subject.first_pass([(RAM, address * PAGE, bytes(PAGE)) for address in range(16)])
    assert subject.ram.allocated() == 0
    subject.check()


def test_a_page_of_zeros_is_written_over_what_a_starting_qemu_left_there() -> None:
    subject = Subject()
    subject.ram.view[:] = b"\xaa" * RAM.size
    subject.replica = Replica([(RAM, subject.ram)])
    subject.first_pass([(RAM, address * PAGE, bytes(PAGE)) for address in range(16)])
    subject.check()
    subject.close()


@pytest.mark.parametrize(
    "blocks",
    [
        (BIOS,),
        (evolve(RAM, size=15 * PAGE), BIOS),
        (evolve(RAM, size=17 * PAGE), BIOS),
        (evolve(RAM, name="other.ram"), BIOS),
        (RAM, Block("vga.vram", SMALL_BLOCKS_LIMIT + PAGE)),
        (RAM, *(Block(f"rom{n}", SMALL_BLOCKS_LIMIT // 2) for n in range(3))),
    ],
    ids=["without it", "smaller", "larger", "renamed", "large", "large together"],
)
def test_ram_blocks_that_do_not_fit_the_standby_are_refused(
    subject: Subject, blocks: tuple[Block, ...]
) -> None:
    with pytest.raises(FrameError):
        subject.bulk(beginning(RamLayout(blocks, 2)))


def test_a_small_block_without_content_does_no_harm() -> None:
    layout = RamLayout((RAM, Block("empty", 0), BIOS), 2)
    subject = Subject(layout)
    subject.first_pass([(RAM, 0, page(1)), (BIOS, 0, page(2))])
    subject.take(1, [(RAM, PAGE, page(3))])
    assert restored(subject.replica)
    subject.check()
    subject.close()


def test_a_block_whose_name_is_as_long_as_names_can_be_is_taken() -> None:
    layout = RamLayout((RAM, Block("\N{SNOWMAN}" * 85, PAGE)), 2)
    subject = Subject(layout)
    subject.first_pass([(layout.blocks[1], 0, page(5))])
    subject.check()
    subject.close()


def test_a_block_list_that_comes_again_changes_nothing(subject: Subject) -> None:
    subject.first_pass()
    section = ram_section(LAYOUT, [])
    subject.bulk(section[:5] + block_list(LAYOUT.blocks) + section[5:])
    subject.check()
    assert len(subject.replica._small) == 3


def test_a_piece_that_ends_inside_a_record_is_refused(subject: Subject) -> None:
    data = beginning(LAYOUT) + ram_section(LAYOUT, FIRST)
    with pytest.raises(FrameError, match="inside a record"):
        subject.bulk(data[:-1])


def test_a_page_outside_its_block_is_refused(subject: Subject) -> None:
    subject.first_pass()
    for address in (RAM.size, 1 << 40):
        with pytest.raises(StreamError):
            subject.bulk(ram_section(LAYOUT, [(RAM, address, page(1))]))
        subject = Subject()
        subject.first_pass()
    subject.close()


@pytest.mark.parametrize("data", [b"", b"QEVM", b"GET / HTTP/1.1\r\n\r\n", bytes(100)])
def test_what_is_no_pass_is_refused(subject: Subject, data: bytes) -> None:
    if data:
        with pytest.raises((FrameError, StreamError)):
            subject.bulk(data)
    else:
        subject.bulk(data)
    assert subject.replica.blocks() == ()


def test_nothing_of_the_first_pass_comes_after_a_checkpoint(subject: Subject) -> None:
    subject.first_pass()
    subject.take(1, [])
    with pytest.raises(FrameError, match="after its end"):
        subject.bulk(ram_section(LAYOUT, FIRST))
    subject.check()


# Checkpoints


def test_checkpoints_follow_one_another(subject: Subject) -> None:
    subject.first_pass()
    for sequence in range(1, 6):
        pages = [(RAM, (sequence * 3 % 16) * PAGE, page(1000 + sequence)), (ODD, 0, page(sequence))]
        subject.take(sequence, pages, DEVICE + bytes((sequence, 0)))
        subject.check()
        assert subject.replica.committed == sequence
        assert restored(subject.replica).endswith(DEVICE + bytes((sequence, 0)))


def test_a_checkpoint_may_change_nothing_but_the_devices(subject: Subject) -> None:
    subject.first_pass()
    subject.take(1, [], b"only this")
    subject.check()
    assert restored(subject.replica).endswith(b"only this")


def test_staging_changes_nothing(subject: Subject) -> None:
    subject.first_pass()
    subject.take(1, [(RAM, 0, page(11))])
    before, stream = subject.content(), restored(subject.replica)
    payload = checkpoint(LAYOUT, [(RAM, 0, page(12)), (BIOS, PAGE, page(13))], b"later devices")
    staged = subject.replica.stage(2, memoryview(payload), len(payload))
    assert staged.sequence == 2
    assert subject.content() == before
    assert restored(subject.replica) == stream
    assert subject.replica.committed == 1


def test_a_commit_done_twice_is_the_same_as_done_once(subject: Subject) -> None:
    subject.first_pass()
    pages = [(RAM, 0, page(21)), (RAM, PAGE, bytes(PAGE)), (ODD, PAGE, page(22))]
    payload = checkpoint(LAYOUT, pages, DEVICE)
    staged = subject.replica.stage(1, memoryview(payload), len(payload))
    subject.replica.commit(staged)
    once, stream = subject.content(), restored(subject.replica)
    subject.replica.commit(staged)
    assert subject.content() == once
    assert restored(subject.replica) == stream
    written(subject.expected, pages)
    subject.check()


def test_a_checkpoint_that_says_same_block_as_before_means_the_last_committed_one(subject: Subject) -> None:
    """QEMU's "same block" reaches back over checkpoints; one that was dropped must not count."""
    subject.first_pass([(RAM, 0, page(1)), (BIOS, 0, page(2))])
    subject.take(1, [(ODD, 0, page(3)), (BIOS, 0, page(4))])
    dropped = checkpoint(LAYOUT, [(RAM, 0, page(5))], DEVICE)
    subject.replica.stage(2, memoryview(dropped), len(dropped))
    named = checkpoint(LAYOUT, [(BIOS, PAGE, page(6))], DEVICE)
    head = CheckpointHead.decode(memoryview(named), len(named))
    at = HEAD_SIZE + 5
    header = struct.pack(">Q", PAGE | 0x08 | 0x20)
    body = named[:at] + header + named[at + 8 + len(b"\x07pc.bios") :]
    payload = evolve(head, ram=head.ram - len(b"\x07pc.bios")).encode() + body[HEAD_SIZE:]
    subject.replica.commit(subject.replica.stage(2, memoryview(payload), len(payload)))
    written(subject.expected, [(BIOS, PAGE, page(6))])
    subject.check()


def test_bytes_after_the_payload_in_its_buffer_mean_nothing(subject: Subject) -> None:
    subject.first_pass()
    payload = checkpoint(LAYOUT, [(RAM, 0, page(31))], DEVICE)
    buffer = payload + b"what a longer checkpoint left in the buffer"
    subject.replica.commit(subject.replica.stage(1, memoryview(buffer), len(payload)))
    written(subject.expected, [(RAM, 0, page(31))])
    subject.check()
    assert restored(subject.replica).endswith(DEVICE)


def test_the_device_state_outlives_the_buffer_it_came_in(subject: Subject) -> None:
    subject.first_pass()
    payload = bytearray(checkpoint(LAYOUT, [], DEVICE))
    subject.replica.commit(subject.replica.stage(1, memoryview(payload), len(payload)))
    payload[:] = bytes(len(payload))
    assert restored(subject.replica).endswith(DEVICE)


def test_a_checkpoint_before_a_first_pass_is_refused(subject: Subject) -> None:
    payload = checkpoint(LAYOUT, [], DEVICE)
    with pytest.raises(FrameError, match="before a first pass"):
        subject.replica.stage(1, memoryview(payload), len(payload))


def test_a_checkpoint_with_a_part_missing_is_refused(subject: Subject) -> None:
    subject.first_pass()
    whole = checkpoint(LAYOUT, [(RAM, 0, page(1)), (RAM, PAGE, page(2))], DEVICE)
    head = CheckpointHead.decode(memoryview(whole), len(whole))
    ram, device = whole[HEAD_SIZE : HEAD_SIZE + head.ram], whole[HEAD_SIZE + head.ram :]
    before = subject.content()
    for wrong in (
        CheckpointHead(head.ram, 0, 0, 1).encode() + ram,
        CheckpointHead(head.ram - 1, head.device + 1, 0, 1).encode() + ram + device,
        CheckpointHead(head.ram + 1, head.device - 1, 0, 1).encode() + ram + device,
        CheckpointHead(0, head.device, 0, 1).encode() + device,
        CheckpointHead(head.ram, head.device, 4, 1).encode() + ram + device,
        CheckpointHead(head.ram, head.device, 0, 1).encode() + ram + device[:-1],
        CheckpointHead(2 * head.ram, head.device, 0, 1).encode() + ram + ram + device,
        b"",
        whole[:HEAD_SIZE],
    ):
        with pytest.raises((FrameError, StreamError)):
            subject.replica.stage(1, memoryview(wrong), len(wrong))
    assert subject.content() == before
    subject.take(1, [])


@pytest.mark.parametrize(
    "pages",
    [[(RAM, RAM.size, page(1))], [(BIOS, 3 * PAGE, page(1))], [(Block("unknown", PAGE), 0, page(1))]],
    ids=["past the end", "past the end of a small one", "of no block"],
)
def test_a_checkpoint_with_a_page_that_has_no_place_is_refused_whole(subject: Subject, pages: Pages) -> None:
    subject.first_pass()
    before = subject.content()
    payload = checkpoint(LAYOUT, [(RAM, 0, page(41)), *pages], DEVICE)
    with pytest.raises(StreamError):
        subject.replica.stage(1, memoryview(payload), len(payload))
    assert subject.content() == before


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_damage_the_digest_did_not_see_is_refused_or_staged_but_never_breaks_the_replica(
    data: st.DataObject,
) -> None:
    subject = Subject()
    subject.first_pass()
    payload = bytearray(checkpoint(LAYOUT, [(RAM, 0, page(51)), (BIOS, 0, bytes(PAGE))], DEVICE))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    before = subject.content()
    try:
        staged = subject.replica.stage(1, memoryview(payload), len(payload))
    except (FrameError, StreamError):
        pass
    else:
        assert subject.content() == before
        subject.replica.commit(staged)  # which cannot fail
        assert subject.replica.committed == 1
        before = subject.content()
    subject.take(2, [(RAM, PAGE, page(52))])
    expected = {name: bytearray(image) for name, image in before.items()}
    written(expected, [(RAM, PAGE, page(52))])
    assert subject.content() == expected
    subject.close()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from(LAYOUT.blocks), st.integers(0, 15), st.integers(0, 5)), max_size=12
        ),
        min_size=1,
        max_size=5,
    )
)
def test_any_checkpoints_leave_exactly_their_pages(story: list[list[tuple[Block, int, int]]]) -> None:
    subject = Subject()
    subject.first_pass()
    for sequence, drawn in enumerate(story, 1):
        pages = [
            (block, index % (len(subject.expected[block.name]) // PAGE) * PAGE, page(number))
            for block, index, number in drawn
        ]
        subject.take(sequence, pages)
        subject.check()
    subject.close()


# The stream for the standby


def test_the_restore_stream_brings_the_small_blocks_the_configuration_and_the_devices(
    subject: Subject,
) -> None:
    subject.first_pass()
    subject.take(1, [(RAM, 0, page(61)), (BIOS, PAGE, page(62))])
    other = Subject()
    stream = restored(subject.replica)
    assert stream.startswith(beginning(LAYOUT))
    assert CONFIGURATION in stream
    assert stream.endswith(DEVICE)
    # Its pages, taken by another replica, are those of the small blocks.
    other.bulk(stream[: -len(DEVICE)])
    content: Mapping[str, bytes] = other.content()
    assert content["pc.bios"] == subject.expected["pc.bios"]
    assert content["/rom@etc/odd"][: ODD.size] == subject.expected["/rom@etc/odd"][: ODD.size]
    assert not any(content["pc.ram"]), "the standby maps it already"
    other.close()


def test_a_machine_without_a_configuration_section_can_be_restored() -> None:
    subject = Subject()
    subject.bulk(beginning(LAYOUT, configuration=b"") + ram_section(LAYOUT, FIRST))
    subject.take(1, [])
    assert restored(subject.replica).startswith(beginning(LAYOUT, configuration=b""))
    subject.close()


def test_closing_frees_the_small_images_and_leaves_the_mapped_ones(subject: Subject) -> None:
    subject.first_pass()
    small = list(subject.replica._small)
    subject.replica.close()
    assert [buffer.fd for _, buffer in small] == [-1, -1, -1]
    assert bytes(subject.ram.view[:PAGE]) == page(1)
