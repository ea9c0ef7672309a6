"""docs/scale.md shows what the benchmarks found, and nothing else."""

from pathlib import Path

from benchmarks.plan_tables import rates, tables

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def test_its_tables_are_those_of_the_results() -> None:
    """No number in them is written by hand."""
    page = PAGE.read_text()
    for table in tables():
        assert table in page
    assert rates() in page
