"""The configuration section, which has no length: its subsections must be known to find its end.

Source of the format: `vmstate_configuration` in QEMU's `migration/savevm.c`.

    07, be32 length, machine type name
    then any of these, each 05, u8 + name, be32 version:
        configuration/target-page-bits    be32 bits
        configuration/capabilities        be32 count, each u8 + name
        configuration/uuid                16 bytes

None of the three is sent for an ordinary x86 guest: the first says that pages are larger than usual,
the second lists the migration capabilities that change the stream, the third comes with
`x-validate-uuid`.
"""

from __future__ import annotations

from curling_fd.vmstate.cursor import Cursor, Incomplete, Malformed
from curling_fd.vmstate.records import MAX_CONFIGURATION, PAGE_BITS, Configuration, SectionType

# Capabilities that put fields into the block list which this scanner does not read.
_OTHER_BLOCK_LIST = frozenset({"x-ignore-shared", "mapped-ram"})


def read_configuration(cursor: Cursor) -> Configuration:
    """Reads the section whose type byte `cursor` stands at, and needs one byte beyond it.

    Raises:
        Incomplete: there is more to come, at most `MAX_CONFIGURATION` bytes of it.
        Malformed: it is not a configuration section, or one that cannot be read.
    """
    start = cursor.at
    limited = Cursor(cursor.buf, start, min(cursor.end, start + MAX_CONFIGURATION + 1))
    try:
        return _read(limited)
    except Incomplete:
        if limited.end - start > MAX_CONFIGURATION:
            raise Malformed(start, f"a configuration of more than {MAX_CONFIGURATION} bytes") from None
        raise


def _read(cursor: Cursor) -> Configuration:
    start = cursor.at
    cursor.u8()
    length = cursor.be32()
    if not 0 < length <= MAX_CONFIGURATION:
        raise Malformed(start, f"a machine type name of {length} bytes")
    raw = cursor.bytes(length)
    try:
        machine = raw.decode()
    except UnicodeDecodeError:
        raise Malformed(start, f"the machine type is not a name: {raw[:40]!r}") from None
    end = cursor.at
    while cursor.u8() == SectionType.SUBSECTION:
        _skip_subsection(cursor)
        end = cursor.at
    return Configuration(bytes(cursor.buf[start:end]), machine)


def _skip_subsection(cursor: Cursor) -> None:
    start = cursor.at
    name = cursor.name("a configuration subsection")
    cursor.be32()
    match name:
        case "configuration/target-page-bits":
            bits = cursor.be32()
            if bits != PAGE_BITS:
                raise Malformed(start, f"the guest's pages have {bits} bits, not {PAGE_BITS}")
        case "configuration/capabilities":
            for _ in range(cursor.be32()):
                capability = cursor.name("a migration capability")
                if capability in _OTHER_BLOCK_LIST:
                    raise Malformed(start, f"the migration capability {capability} is on")
        case "configuration/uuid":
            cursor.bytes(16)
        case _:
            raise Malformed(start, f"an unknown configuration subsection, {name}")
