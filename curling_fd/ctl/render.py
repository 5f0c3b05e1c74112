"""Where the output of curlingctl goes: JSON, a terminal (rich), or plain text for everything else."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from curling_fd.ctl.failure import Failure
from curling_fd.ctl.words import clean, style_of

if TYPE_CHECKING:  # rich is slow to import: only a terminal needs it
    from rich.console import Console
    from rich.table import Table


class Output:
    """Standard output, in the form that was asked for."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.is_terminal = sys.stdout.isatty() and not as_json

    def document(self, document: Mapping[str, Any]) -> None:
        """Write the one JSON document of a command."""
        print(json.dumps(document, indent=2))

    def item(self, item: Mapping[str, Any]) -> None:
        """Write one of many JSON documents, on a line of its own, at once."""
        print(json.dumps(item), flush=True)

    def say(self, line: str) -> None:
        """Write a line of text, at once."""
        print(clean(line), flush=True)

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write a table; cells that are states or statuses are coloured on a terminal."""
        if self.is_terminal:
            self.console().print(rich_table(headers, rows))
        else:
            for line in plain_table([headers, *rows]):
                print(line)

    def pairs(self, title: str, pairs: Iterable[tuple[str, str]]) -> None:
        """Write a title and what belongs to it, names aligned."""
        if self.is_terminal:
            from rich.text import Text

            self.console().print(Text(title, style="bold"))
            for name, value in pairs:
                self.console().print(
                    Text.assemble((f"  {name:<14}", "dim"), (value, style_of(value))), soft_wrap=True
                )
        else:
            print(title)
            for name, value in pairs:
                print(f"  {name:<14}{value}")

    def failure(self, failure: Failure, prog: str = "curlingctl") -> None:
        """Write why a command failed: JSON to standard output, words to standard error."""
        if self.as_json:
            self.document(failure.document())
            return
        lines = [f"{prog}: {failure.text}"]
        # What a program printed before it gave up is worth more than any summary of it.
        printed = failure.facts.get("stderr")
        if isinstance(printed, str):
            lines += [f"    {line}" for line in printed.strip().splitlines()]
        if failure.remedy:
            lines.append(f"  What to do: {failure.remedy}")
        print(clean("\n".join(lines)), file=sys.stderr, flush=True)

    def console(self) -> Console:
        """Return a rich console on standard output."""
        from rich.console import Console

        return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)


def plain_table(rows: Sequence[Sequence[str]], widths: Sequence[int] = ()) -> list[str]:
    """Align columns with spaces, two between them; nothing is cut.

    Args:
        rows: of equally many cells each.
        widths: the least for each column.
    """
    columns = list(zip(*rows, strict=True))
    least = [*widths, *([0] * (len(columns) - len(widths)))]
    wide = [max(least[place], *map(len, column)) for place, column in enumerate(columns)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, wide, strict=True)).rstrip() for row in rows
    ]


def rich_table(headers: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None) -> Table:
    """Make a table for a terminal; the last column takes what room there is and is folded into it."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), caption=caption, caption_justify="left")
    for header in headers:
        table.add_column(header, overflow="fold", no_wrap=header != headers[-1])
    for row in rows:
        table.add_row(*(Text(cell, style=style_of(cell)) for cell in row))
    return table
