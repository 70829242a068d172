"""schemathesis sends requests made from /openapi.json: valid ones, and wrong ones, which have to be refused."""

import subprocess
import sys
from pathlib import Path

from tests.helpers.tiny import talking_checkpoint
from tests.peers import suites  # noqa: F401 - skips this test if the peers aren't installed
from tests.serve.conftest import serving

# A valid request may be refused: its prompt is empty, or too long for the context.
OPTIONS = ("--exclude-checks", "positive_data_acceptance", "--phases", "fuzzing", "--max-examples", "50", "--seed", "1")


def test_replies_are_as_described_and_wrong_requests_refused(tmp_path: Path) -> None:
    talking_checkpoint(tmp_path / "tiny", max_position_embeddings=64)
    with serving("--model", tmp_path / "tiny", "--threads", 1) as server:
        run = [Path(sys.executable).with_name("schemathesis"), "run", f"{server.root}/openapi.json", *OPTIONS]
        subprocess.run(run, cwd=tmp_path, check=True)
