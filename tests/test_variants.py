"""The README's table of sizes is what the command prints."""

from __future__ import annotations

import re

import variants
from models import FAMILIES


def shown_rows() -> list[str]:
    """The lines of the table in README.md."""
    return variants.README.shown().splitlines()


def test_the_table_holds_every_size_of_every_family() -> None:
    """Counting the operations takes seconds, so that is asked of one size of each family."""
    rows = shown_rows()
    for family in FAMILIES.keys() - {"toy"}:  # which other tests of this process may have added
        there = [row for row in rows if row.startswith(f"| {family} |")]
        sizes = [(name, settings) for name, settings in variants.sizes_of(family)]
        assert {row.split(" | ")[1] for row in there} <= {name for name, _ in sizes}
        name, settings = next(
            (name, settings) for name, settings in sizes if f"| {family} | {name} |" in "".join(there)
        )
        assert f"| {' | '.join(variants.row_of(family, name, settings) or [])} |" in there


def test_every_publisher_has_a_licence() -> None:
    licences = [row.split(" | ")[-1] for row in shown_rows()[2:]]
    assert all(re.search(r"\w", licence) for licence in licences)
    assert variants.licence("hf-hub:timm/vit_small_patch16_dinov3.lvd1689m") == "DINOv3 License"
