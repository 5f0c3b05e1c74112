"""An image of one RAM block, kept up by the pages of a migration stream.

A page that was never written is zero without taking memory, and most of a guest's memory is sent as such a
page first: writing it would cost the image a page and, as its first use, ten times the time of later writes.
So the image remembers which pages were written.
"""

from __future__ import annotations

from curling_fd.vmstate.ram import fill_bytes, page_addresses
from curling_fd.vmstate.records import PAGE_BITS, PAGE_SIZE, PAGE_STRIDE, FillRun, PageRun

ZERO_PAGE = bytes(PAGE_SIZE)


class RamImage:
    """The pages of a RAM block in `view`, borrowed memory of whole pages.

    Args:
        fresh: all of it is zero and none of it was ever written.
    """

    def __init__(self, view: memoryview, *, fresh: bool = True) -> None:
        self.view = view
        pages = len(view) >> PAGE_BITS
        self._written = bytearray(pages) if fresh else bytearray(b"\x01") * pages

    def apply(self, buf: memoryview, run: PageRun | FillRun) -> None:
        """Write the pages of `run`, which lies in `buf`."""
        image, written = self.view, self._written
        addresses = page_addresses(buf, run)
        if isinstance(run, PageRun):
            data = run.data
            for address in addresses:
                image[address : address + PAGE_SIZE] = buf[data : data + PAGE_SIZE]
                written[address >> PAGE_BITS] = 1
                data += PAGE_STRIDE
            return
        for address, byte in zip(addresses, fill_bytes(buf, run), strict=True):
            if byte or written[address >> PAGE_BITS]:
                self.write(address, ZERO_PAGE if not byte else bytes([byte]) * PAGE_SIZE)

    def write(self, address: int, page: bytes) -> None:
        """Write one page."""
        self.view[address : address + PAGE_SIZE] = page
        self._written[address >> PAGE_BITS] = 1

    def page(self, address: int) -> bytes:
        """The page at `address`, without touching memory that was never written."""
        if not self._written[address >> PAGE_BITS]:
            return ZERO_PAGE
        return bytes(self.view[address : address + PAGE_SIZE])
