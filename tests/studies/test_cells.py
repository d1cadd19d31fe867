"""A finished cell is kept; one made with other settings is refused, never mixed in."""

import pytest

from kimi_linear.studies.cells import read_cell, write_cell

SETTINGS = {"steps": 10, "lr": 0.003}


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "kda-seed0.json"
    write_cell(path, SETTINGS, {"accuracy": 0.1 + 0.2})
    assert read_cell(path, SETTINGS) == {"settings": SETTINGS, "accuracy": 0.1 + 0.2}
    assert [p.name for p in path.parent.iterdir()] == ["kda-seed0.json"]


def test_an_unfinished_cell_is_none(tmp_path):
    assert read_cell(tmp_path / "kda-seed0.json", SETTINGS) is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"steps": 10, "lr": 0.01}, r"lr: expected 0.01, as asked for now, got a cell made with 0.003"),
        ({"steps": 10}, r"lr: expected None, as asked for now, got a cell made with 0.003"),
        ({"steps": 10, "lr": 0.003, "wd": 1}, r"wd: expected 1, .*made with None"),
    ],
)
def test_other_settings_are_refused(other, message, tmp_path):
    write_cell(tmp_path / "c.json", SETTINGS, {})
    with pytest.raises(ValueError, match=message):
        read_cell(tmp_path / "c.json", other)


@pytest.mark.parametrize("text", ["", "[]", '{"accuracy": 1}', '{"settings": {'])
def test_a_damaged_cell_is_refused(text, tmp_path):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match="delete the file to run it again"):
        read_cell(tmp_path / "c.json", SETTINGS)
