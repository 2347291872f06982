"""Writes `docs/matrix.md`: does method X work with layer Y under layout Z? Told by the laws that have just run, never by hand.

A cell is the cell tests of `test_laws.py` for one method and one layer: in one process, and on layouts. The page is written when a
run has been through all cells, and never half of it. An ordinary run tries most cells on one layout; if all of them pass and the rows,
columns and refusals are those of the page, it leaves what fuller runs (D9D_LORA_EVERY_CELL=1) have written.
"""

from pathlib import Path

from tests.catalogue import EVERY_CELL, LAYERS, LAYOUTS, METHODS, layouts_of

PAGE = Path(__file__).resolve().parents[1] / "docs/matrix.md"
ONE = "one"
# The tests that make up a cell, and whether they are run for each layout.
PARALLEL_LAWS = {"test_starts_gradients_steps_and_merge_equal_one_process"}
LAWS = {
    "test_the_start_changes_nothing_and_every_factor_is_live",
    "test_merged_is_adapted_and_unmerged_is_the_original_to_the_bit",
}
REFUSAL = "test_a_refusal_is_a_sentence_and_leaves_the_model_as_it_was"

HEAD = """# What works with what

Written by the test run (`tests/matrix.py`); do not edit. Each cell stands for these laws, against one process, in fp64: the start
changes nothing and every factor comes alive; starts, gradients of every factor and weights after AdamW steps are equal on the
layout; merged is adapted, and unmerged is the original to the bit, on the layout.

[Pipelines](training.md#pipelines), [expert](experts.md#expert-parallelism) and [context parallelism](training.md#long-contexts) are no
columns here: they are proven by whole runs of the trainer, with the methods that their pages name.

A cell names the layouts on which it was tried, and all of that holds; **all** are
"""
EVERY = "Every cell was tried on every layout."
TURNS = "The commonest methods were tried on every layout, other cells on some in turn (`layouts_of` in `tests/catalogue.py`)."


class Matrix:
    """Collects outcomes of a test run."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str, str, str], bool] = {}  # (law, method, layer, layout) -> passed
        self.refusals: dict[tuple[str, str], str] = {}

    def observe(self, law: str, params: dict[str, str], passed: bool, properties: dict[str, str]) -> None:
        """Notes one test; others than those of cells are nothing to it."""
        if law == REFUSAL and passed:
            self.refusals[params["method"], params["layer"]] = properties["refusal"]
        elif law in LAWS | PARALLEL_LAWS:
            self.outcomes[law, params["method"], params["layer"], params.get("layout", ONE)] = passed

    def is_whole(self) -> bool:
        """Whether every cell of this run's catalogue was run."""
        return all(
            (m, la) in self.refusals
            if la in METHODS[m].refuses
            else all((law, m, la, layout) in self.outcomes for layout in (ONE, *layouts_of(m, la)) for law in laws_on(layout))
            for m in METHODS
            for la in LAYERS
        )

    def cell(self, method: str, layer: str) -> str:
        if (method, layer) in self.refusals:
            return f"[refused](#{anchor(method, layer)})"
        tried = [layout for layout in LAYOUTS if layout in (ONE, *layouts_of(method, layer))]
        green = [layout for layout in tried if all(self.outcomes[law, method, layer, layout] for law in laws_on(layout))]
        return "all" if len(green) == len(LAYOUTS) else ", ".join(green) or "none"

    def page(self) -> str:
        lines = [HEAD + ", ".join(f"`{name}`" for name in LAYOUTS) + ".\n"]
        lines += ["| | " + " | ".join(f"`{la}`" for la in LAYERS) + " |", "|---|" + "---|" * len(LAYERS)]
        lines += [f"| `{m}` | " + " | ".join(self.cell(m, la) for la in LAYERS) + " |" for m in METHODS]
        lines += ["", EVERY if EVERY_CELL else TURNS]
        lines += [f"{len(METHODS)} methods x {len(LAYERS)} layers x {len(LAYOUTS)} layouts, defined in `tests/catalogue.py`."]
        if self.refusals:
            lines += ["", "## Refusals", "", "What a user is told, in place of a result:"]
        for (m, la), sentence in self.refusals.items():
            lines += ["", f"### {m} on {la}", "", sentence]
        return "\n".join(lines) + "\n"

    def write(self) -> bool:
        """Writes the page if it is whole and says something new; returns whether it did."""
        if not self.is_whole():
            return False
        page, there = self.page(), PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        nothing_new = all(self.outcomes.values()) and outline(there) == outline(page) and (EVERY in there or not EVERY_CELL)
        if page == there or nothing_new:
            return False
        PAGE.write_text(page, encoding="utf-8")
        return True


def laws_on(layout: str) -> set[str]:
    return LAWS if layout == ONE else PARALLEL_LAWS


def outline(page: str) -> list[str]:
    """The rows and columns of a page, and its refusals, without what cells say."""
    return [line.split("|")[1] if line.startswith("| `") else line for line in page.splitlines() if line not in (EVERY, TURNS)]


def anchor(method: str, layer: str) -> str:
    return f"{method}-on-{layer}".replace(" ", "-").lower()
