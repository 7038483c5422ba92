"""WikiText's articles, restored from its lines.

The dataset has a row a line: ` = Title = ` opens an article, ` = = Section = = ` a section of it, and what is a blank
line in the raw file is an empty row (Merity et al., "Pointer Sentinel Mixture Models", section 4).
"""

import re
from collections.abc import Iterable, Iterator

_TITLE = re.compile(r' = [^=\s](.*[^=\s])? = \n?')
BLANK = ' \n'  # as the raw file has it


def articles(rows: Iterable[str]) -> Iterator[str]:
    """The articles, each with its title, as the raw file has them.

    A title has a blank line before and after it: a line of an article may look like one.
    """
    lines: list[str] = []
    held: str | None = None  # a line that is a title if a blank one follows
    blank = True
    for row in rows:
        line = row if row.strip() else BLANK
        if held is not None:
            if line == BLANK:
                if any(before != BLANK for before in lines):
                    yield ''.join(lines)
                lines = []
            lines.append(held)
            held = None
        if blank and _TITLE.fullmatch(line):
            held = line
        else:
            lines.append(line)
        blank = line == BLANK
    if held is not None:
        lines.append(held)
    if any(before != BLANK for before in lines):
        yield ''.join(lines)
