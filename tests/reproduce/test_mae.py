"""The whole road of `pentad reproduce mae`, at a size that shows nothing but that it works."""

from pathlib import Path

import pytest

from pentad.reproduce import mae


def test_the_whole_road(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENTAD_CACHE", str(tmp_path / "cache"))
    size = mae.Size(scenes=12, held_out=6, pretraining=2, tuning=2, batch=8, labels=0.5)
    notes = list[str]()
    report = mae.run(tmp_path, 2, notes.append, size)
    assert {name: len(values) for name, values in report.rows.items()} == {"pretrained": 2, "from random weights": 2}
    assert all(0 <= value <= 100 for values in report.rows.values() for value in values)
    assert len(notes) >= 6
