"""Tables of scores, as people read them: on a console, in CSV, Markdown and LaTeX.

table = Table("scores", [Column("run"), Column("mae", "MAE", "lower")], keys=1)
table.rows.append([Cell("first"), Cell(0.0213, "0.0213", is_best=True)])
print(to_console(table, width=80))
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from colorama import Style

from checkpoint import write_text
from errors import UserError, nearest


@dataclass(frozen=True)
class Column:
    """`name` heads the column in CSV, `label` (by default the name) wherever people read it."""

    name: str
    label: str = ""
    better: Literal["higher", "lower", ""] = ""

    @property
    def heading(self) -> str:
        return self.label or self.name


@dataclass(frozen=True)
class Cell:
    """`value` stands in CSV, `text` (by default the value) wherever people read it. The best ones are marked."""

    value: str | int | float
    text: str = ""
    is_best: bool = False

    @property
    def shown(self) -> str:
        return self.text or str(self.value)

    @property
    def is_number(self) -> bool:
        return not isinstance(self.value, str)


@dataclass
class Table:
    """Rows of cells under columns, the first `keys` of which say what a row is about; `notes` stand below."""

    title: str
    columns: list[Column]
    keys: int = 1
    rows: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def decimals(values: Sequence[float]) -> int:
    """How many decimals a column of scores is shown with: four for shares and the like, fewer for counts of pixels."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return 4 if largest < 10 else 2 if largest < 1000 else 1


def number(value: float, digits: int, *, sign: bool = False) -> str:
    """A score as it is shown, with its sign where asked for; a dash where there is none."""
    return "-" if math.isnan(value) else f"{value:{'+' if sign else ''}.{digits}f}"


# ---------------------------------------------------------------- the console


def to_console(table: Table, *, width: int = 80, bold: bool = False) -> str:
    """Aligned columns. What does not fit into `width` follows below, each block with the keys in front of its rows.

    The best are bold, or marked with a star where the output shows no colours (plain ASCII then).
    """
    keys = [_aligned(table, position, bold) for position in range(table.keys)]
    room = width - sum(_width(lines) + 2 for lines in keys)
    blocks: list[list[list[str]]] = []
    taken = width
    for position in range(table.keys, len(table.columns)):
        lines = _aligned(table, position, bold)
        taken += _width(lines) + 2
        if taken - 2 > room:
            blocks.append([])
            taken = _width(lines) + 2
        blocks[-1].append(lines)
    texts = ["\n".join("  ".join(line).rstrip() for line in zip(*keys, *block, strict=True)) for block in blocks]
    return "\n".join([f"{table.title}\n", "\n\n".join(texts), *(["", *table.notes] if table.notes else [])])


def _aligned(table: Table, position: int, bold: bool) -> list[str]:
    """The heading and the cells of one column, all of one width: text to the left, numbers to the right."""
    cells = [row[position] for row in table.rows]
    starred = not bold and any(cell.is_best for cell in cells)
    texts = [table.columns[position].heading, *(cell.shown for cell in cells)]
    marks = [" " * starred, *("*" if starred and cell.is_best else " " * starred for cell in cells)]
    width = max(map(len, texts))
    to_right = all(cell.is_number for cell in cells)
    lines = [(text.rjust(width) if to_right else text.ljust(width)) + mark
             for text, mark in zip(texts, marks, strict=True)]  # fmt: skip
    if bold:
        lines[1:] = [f"{Style.BRIGHT}{line}{Style.RESET_ALL}" if cell.is_best else line
                     for line, cell in zip(lines[1:], cells, strict=True)]  # fmt: skip
    return lines


def _width(lines: list[str]) -> int:
    return len(lines[0])  # the heading is never bold


# ---------------------------------------------------------------- files


def to_csv(table: Table) -> str:
    """Names and values in full, without marks and notes; a value that is not a number is left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([column.name for column in table.columns])
    for row in table.rows:
        values = [cell.value for cell in row]
        writer.writerow(["" if isinstance(value, float) and math.isnan(value) else value for value in values])
    return text.getvalue()


def to_markdown(table: Table) -> str:
    """A pipe table with arrows for the better direction and the best in bold."""
    arrows = {"higher": " ↑", "lower": " ↓", "": ""}
    headings = [_markdown(column.heading) + arrows[column.better] for column in table.columns]
    numeric = [all(row[position].is_number for row in table.rows) for position in range(len(headings))]
    lines = [headings, ["---:" if is_number else ":---" for is_number in numeric]]
    lines += [[f"**{_markdown(cell.shown)}**" if cell.is_best else _markdown(cell.shown) for cell in row]
              for row in table.rows]  # fmt: skip
    notes = [f"- {_markdown(note)}" for note in table.notes]
    pipes = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join([f"### {_markdown(table.title)}", pipes, *(["\n".join(notes)] if notes else [])]) + "\n"


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)


def to_latex(table: Table) -> str:
    """A `tabular` with booktabs rules, a rule where the first key changes, arrows and the best in bold."""
    arrows = {"higher": r" $\uparrow$", "lower": r" $\downarrow$", "": ""}
    headings = [_latex(column.heading) + arrows[column.better] for column in table.columns]
    numeric = [all(row[position].is_number for row in table.rows) for position in range(len(headings))]
    lines = [f"% {table.title}; needs \\usepackage{{booktabs}}",
             rf"\begin{{tabular}}{{{''.join('r' if is_number else 'l' for is_number in numeric)}}}",
             r"\toprule", " & ".join(headings) + r" \\"]  # fmt: skip
    group = None
    for row in table.rows:
        if table.keys > 1 or group is None:
            lines += [r"\midrule"] if row[0].value != group else []
        group = row[0].value
        cells = [_latex(cell.shown) for cell in row]
        cells = [rf"\textbf{{{text}}}" if cell.is_best else text for text, cell in zip(cells, row, strict=True)]
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", *(f"% {note}" for note in table.notes)]
    return "\n".join(lines) + "\n"


LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


FORMATS: dict[str, Callable[[Table], str]] = {".csv": to_csv, ".md": to_markdown, ".tex": to_latex}


def check_output(path: str, suffixes: Sequence[str] = tuple(FORMATS)) -> None:
    """Raise `UserError` now for a file that could not be written in the end."""
    file = Path(path)
    if file.suffix not in suffixes:
        raise UserError(f"{path} must end in {', '.join(suffixes)}{nearest(file.suffix, suffixes)}")
    folder = file.parent
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: it needs a folder that exists and may be written into")


def write_tables(path: str, tables: Sequence[Table]) -> None:
    """Write `path` by its suffix, whole or not at all; CSV holds the first table alone. Raises `UserError`."""
    file = Path(path)
    text = to_csv(tables[0]) if file.suffix == ".csv" else "\n".join(map(FORMATS[file.suffix], tables))
    try:
        write_text(file, text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
