"""Standard streams that are closed, full or read only in part."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(command: str) -> subprocess.CompletedProcess[str]:
    """Run `pentad COMMAND` with bash's redirections."""
    environment = {**os.environ, "PENTAD": f"{sys.executable} -m pentad"}
    return subprocess.run(
        ["bash", "-c", f"$PENTAD {command}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("redirection", ["2>&-", "<&-", "2>&- <&-"])
def test_closed_input_and_error_output(redirection: str) -> None:
    done = run(f"models {redirection}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "smollm2" in done.stdout


def test_closed_output_is_an_error() -> None:
    done = run("models >&-")
    assert done.returncode == 1
    assert "standard output is closed" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("options", ["", "--json"])
def test_full_disk_is_an_error(options: str) -> None:
    done = run(f"models {options} > /dev/full")
    assert done.returncode == 1
    assert "standard output" in done.stderr
    assert "no space left" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_reader_that_stops_ends_the_command_quietly() -> None:
    done = run("models | true; echo ${PIPESTATUS[0]}")
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_the_answer_comes_without_other_streams(smollm2: Path) -> None:
    done = run(f"complete Hello --model {smollm2} --max-tokens 2 --seed 1 2>&- <&-")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
