"""Test suites of other projects, from the sdists that they publish."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("pytest_asyncio", reason="make peers installs it")

PEERS = Path(__file__).parent
ROOT = PEERS.parents[1]
CACHE = ROOT / "build" / "peers"


def sdist(package: str) -> Path:
    """The unpacked sdist of a package, of the version in constraints.txt; downloaded once."""
    version = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    folder = CACHE / f"{package}-{version}"
    if not folder.exists():
        options = ["--quiet", "--no-deps", "--no-binary", package, "--dest", CACHE]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, f"{package}=={version}"], check=True)
        with tarfile.open(f"{folder}.tar.gz") as archive:
            archive.extractall(CACHE, filter="data")
    return folder


def run_suite(folder: Path, name: str, *arguments: str, **environment: str) -> None:
    """Run a suite's tests, but for those that `not_applicable/<name>.txt` lists."""
    listed = f"--listed={PEERS / 'not_applicable' / name}.txt"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "listed", listed, *arguments]
    path = os.pathsep.join([str(PEERS), str(ROOT)])
    assert subprocess.run(command, cwd=folder, env=os.environ | environment | {"PYTHONPATH": path}).returncode == 0
