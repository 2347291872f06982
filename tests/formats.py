"""Writes `docs/formats_table.md`: which program has read or written which format, and how far its numbers were from ours.

A test of a format calls the `proof` fixture with what it has just compared. A run of the whole suite, with no failure, writes the page
anew if a row came, went or names another version, or if a difference is larger than the page says; a run of some tests leaves it alone.
"""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs/formats_table.md"
HEAD = """# Formats, as they were proven

Written by the test run (`tests/formats.py`); do not edit. Each row is a test with the real program: it has read what we wrote, or we have
read what it wrote, on the same inputs. The number is the largest difference that was seen, in one digit.

| format | method | direction | with | compared | largest difference |
|---|---|---|---|---|---|
"""
DIRECTIONS = ("written", "read", "both")
Key = tuple[str, str, str, str, str]


class Formats:
    """Collects what a test run has proven."""

    def __init__(self) -> None:
        self.rows: dict[Key, float] = {}

    def proof(self, format: str, method: str, direction: str, *, by: str, compared: str, difference: float) -> None:
        """Notes one comparison.

        Args:
            format: "PEFT directory", "GGUF", ...
            method: The kind, with what is special about the case: "lora, rank patterns".
            direction: "written" by us and read by the program, "read" by us, or "both".
            by: The package that holds the program; its version is looked up.
            compared: What the number is of: "logits", "merged weights".
            difference: The largest absolute difference.
        """
        assert direction in DIRECTIONS, direction
        key = (format, method, direction, f"{by} {version(by)}", compared)
        self.rows[key] = max(self.rows.get(key, 0.0), float(difference))

    def page(self) -> str:
        return HEAD + "".join(f"| {' | '.join(key)} | {self.rows[key]:.0e} |\n" for key in sorted(self.rows))

    def write(self) -> bool:
        """Writes the page if it says something new; returns whether it did."""
        there = read(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
        self.rows |= {key: value for key, value in there.items() if not installed(key[3].split()[0])}  # this run could not try them
        grown = any(value > 1.5 * there.get(key, 0.0) for key, value in self.rows.items() if value > 0)
        if not self.rows or (there.keys() == self.rows.keys() and not grown):
            return False
        self.rows = {key: max(value, there.get(key, 0.0)) for key, value in self.rows.items()}
        PAGE.write_text(self.page(), encoding="utf-8")
        return True


def installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def read(page: str) -> dict[Key, float]:
    """The rows of a page."""
    found = re.findall(r"^\| (.+) \|$", page, re.M)
    return {tuple(cells[:5]): float(cells[5]) for row in found if len(cells := row.split(" | ")) == 6 and cells[5] != "largest difference"}
