"""``pentad reproduce``: its list, and what it refuses."""

import json
from pathlib import Path

from pentad.reproduce import NAMES
from tests.cli.conftest import Pentad


def test_each_claim_is_listed(pentad: Pentad) -> None:
    listed = pentad("reproduce", "--list", "--json")
    assert [json.loads(line)["name"] for line in listed.out.splitlines()] == list(NAMES)


def test_what_is_refused(pentad: Pentad, tmp_path: Path) -> None:
    assert "mae" in pentad("reproduce", "nothing").error
    assert "exists already" in pentad("reproduce", "mae", "--out", tmp_path).error
