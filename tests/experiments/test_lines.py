"""The file of finished cells survives a kill at any byte."""

from __future__ import annotations

import pytest

from benchmarks.experiments.lines import Line, Lines, key_of


def filled(path, count=3):
    lines = Lines(path)
    for number in range(count):
        lines.append(Line({"method": "plain", "seed": number}, {"nll": number / 3}))
    return lines


def test_cells_come_back_as_they_were(tmp_path):
    lines = filled(tmp_path / "new" / "a.jsonl")
    assert [line.cell["seed"] for line in lines.read()] == [0, 1, 2]
    assert [line.found["nll"] for line in lines.read()] == [0, 1 / 3, 2 / 3]
    assert Lines(tmp_path / "none.jsonl").read() == []


def test_a_line_cut_off_anywhere_is_left_out_and_written_over(tmp_path):
    content = filled(tmp_path / "a.jsonl").path.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    for size in range(last, len(content)):  # what a kill may leave of the third line
        lines = Lines(tmp_path / "b.jsonl")
        lines.path.write_bytes(content[:size])
        assert len(lines.read()) == 2
        lines.append(Line({"seed": 9}, {}))
        assert [line.cell["seed"] for line in lines.read()] == [0, 1, 9]


def test_the_last_line_of_a_cell_counts(tmp_path):
    lines = filled(tmp_path / "a.jsonl")
    lines.append(Line({"seed": 1, "method": "plain"}, {"nll": 7.0}))  # in another order
    assert [line.found["nll"] for line in lines.read()] == [0, 7, 2 / 3]
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})


def test_other_damage_is_said(tmp_path):
    lines = filled(tmp_path / "a.jsonl")
    lines.path.write_bytes(b'{"cell": {}}\n' + lines.path.read_bytes())
    with pytest.raises(ValueError, match="line 1: no finished cell"):
        lines.read()
