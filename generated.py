"""Text that a command makes and keeps in a page, between two marks, with hand-written text around it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoint import write_text
from errors import UserError

END = "<!-- end -->"


@dataclass(frozen=True)
class Generated:
    """What `python <script>` prints and, with `--write`, puts into `page`."""

    script: str
    page: Path

    @property
    def begin(self) -> str:
        return f"<!-- what `python {self.script}` prints -->\n"

    def shown(self) -> str:
        """What the page holds between its marks."""
        return self.page.read_text(encoding="utf-8").partition(self.begin)[2].partition(END)[0]

    def command(self, make: Callable[[], str]) -> None:
        """Print what `make` returns, or write it into the page. Raises `UserError` for other words."""
        words = [word for word in sys.argv[1:] if word != "--debug"]
        if words not in ([], ["--write"]):
            raise UserError(f"unexpected {words[0]}: write python {self.script}, or python {self.script} --write")
        text = make()
        if not words:
            print(text, end="")
            return
        before, _, rest = self.page.read_text(encoding="utf-8").partition(self.begin)
        write_text(self.page, before + self.begin + text + END + rest.partition(END)[2])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], rules: Sequence[str] = ()) -> str:
    """A table; `rules` say how its columns are aligned, to the left where nothing is said."""
    lines = [head, rules or ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
