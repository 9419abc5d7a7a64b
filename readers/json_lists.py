"""The lists of a json of any size, one element at a time.

Python's own parser reads each element from a window that moves over the file, so memory is bounded by the longest
element, and what counts as json is what `json.loads` takes (NaN, for one, which other streaming parsers refuse).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

PIECE = 1 << 20  # bytes that are read at once

_blank = re.compile(r"[ \t\n\r]*")
_decode = json.JSONDecoder().raw_decode


class NoObject(ValueError):
    """What a json holds is no object."""


class Element(NamedTuple):
    key: str  # of the list
    position: int  # in the list
    value: Any
    start: int  # in the file, in bytes
    length: int


def elements(path: Path) -> Iterator[Element]:
    """Every element of every list that the file's object holds; a list is announced by an element at position -1.

    Values that are no lists are passed over.

    Raises:
        OSError, ValueError, RecursionError: no json, as `json.loads` finds, or not in UTF-8.
        NoObject: json, but no object.
    """
    with open(path, "rb") as file:
        window = _Window(file)
        if window.peek() != "{":
            window.value()
            window.end()
            raise NoObject("it holds no object")
        for key in window.members("{", "}"):
            if window.peek() != "[":
                window.value()
                continue
            yield Element(key, -1, None, window.place, 0)
            for position, _ in enumerate(window.members("[", "]")):
                start = window.place
                value = window.value()
                yield Element(key, position, value, start, window.place - start)
        window.end()


class _Window:
    """A part of a file as Latin-1 text, whose characters are the file's bytes; structure is ASCII in any case."""

    def __init__(self, file: BinaryIO):
        head = file.read(4)
        if json.detect_encoding(head) not in ("utf-8", "utf-8-sig"):
            raise ValueError("it is not in UTF-8")
        self.file, self.text, self.at = file, head.decode("latin-1"), 0
        self.first = 0  # of the text in the file
        if head.startswith(b"\xef\xbb\xbf"):
            self.at = 3

    @property
    def place(self) -> int:
        """Where in the file the next character is."""
        return self.first + self.at

    def peek(self) -> str:
        """The next character that is not blank, or nothing at the end."""
        while True:
            self.at = _blank.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_on():
                return ""

    def members(self, opening: str, closing: str) -> Iterator[str]:
        """Go to each member of a list or an object in turn; the caller takes its value. Yields the key, if any."""
        self._expect(opening)
        if self.peek() == closing:
            self._expect(closing)
            return
        while True:
            self.peek()
            yield self._key() if opening == "{" else ""
            if self.peek() == closing:
                self._expect(closing)
                return
            self._expect(",")

    def value(self) -> Any:
        """Take the next value."""
        while True:
            try:
                value, end = _decode(self.text, self.at)
            except json.JSONDecodeError as error:
                breaks_off = error.msg.startswith("Unterminated string") or self._is_near_end(error.pos)
                if breaks_off and self._read_on():
                    continue
                raise ValueError(f"{error.msg} at byte {self.first + error.pos}") from error
            if self._is_near_end(end) and self._read_on():  # of a number there may be more
                continue
            if not self.text.isascii():
                value = json.loads(self.text[self.at : end].encode("latin-1"))
            self.at = end
            return value

    def _is_near_end(self, place: int) -> bool:
        """Whether the window may end within what begins here; no token but a string is longer than this."""
        return place > len(self.text) - 16

    def end(self) -> None:
        """Make sure that nothing follows."""
        if self.peek():
            raise ValueError(f"Extra data at byte {self.place}")

    def _key(self) -> str:
        if self.peek() != '"':
            raise ValueError(f"Expecting a name in double quotes at byte {self.place}")
        key = self.value()
        self._expect(":")
        self.peek()
        return key

    def _expect(self, character: str) -> None:
        if self.peek() != character:
            raise ValueError(f"Expecting {character!r} at byte {self.place}")
        self.at += 1

    def _read_on(self) -> bool:
        """Let go of what was taken and read on, twice as much each time that one value is not complete."""
        piece = self.file.read(max(PIECE, len(self.text) - self.at))
        if not piece:
            return False
        self.first += self.at
        self.text = self.text[self.at :] + piece.decode("latin-1")
        self.at = 0
        return True
