"""Completion in the shell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def completions(words: str, tmp_path: Path) -> list[str]:
    """What bash is offered for the last of some words."""
    (tmp_path / "hub" / "models--org--smol--chat").mkdir(parents=True, exist_ok=True)
    count = len(words.split(" ")) - 1
    asked = {
        "_PENTAD_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(count),
        "HF_HOME": str(tmp_path),
    }
    environment = {**os.environ, **asked}
    environment.pop("HF_HUB_CACHE", None)
    code = (
        "import sys\nfrom pentad.cli import main\n"
        "try:\n    main()\nfinally:\n    assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "Error" not in done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("pentad com", ["complete"]),
        ("pentad chat --mod", ["--model"]),
        ("pentad chat --model sm", ["smollm2"]),
        ("pentad chat -m org/", ["org/smol--chat"]),
        ("pentad rm s", ["sam-scenes", "smollm2"]),
        ("pentad rm yolo-", ["yolo-fastest-1.1", "yolo-fastest-1.1-xl"]),
        ("pentad chat --model ./", []),
    ],
)
def test_commands_options_and_models_complete(words: str, expected: list[str], tmp_path: Path) -> None:
    assert completions(words, tmp_path) == expected
