"""Test suites of other projects, from the sdists that they publish."""

import os
import re
import subprocess
import sys
import tarfile
import venv
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


def command(package: str, version: str) -> Path:
    """The command of a package that pins other versions of pentad's dependencies, from an environment of its own.

    The environment shares all packages of this one whose versions suit it, such as torch.
    """
    folder = CACHE / f"{package}-{version}"
    if not (folder / "bin" / package).exists():
        venv.create(folder, with_pip=True, clear=True)
        shared = next(folder.glob("lib/*/site-packages")) / "shared.pth"
        shared.write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, f"{package}=={version}"], check=True)
    return folder / "bin" / package
