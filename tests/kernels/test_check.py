"""A quick run of the C++ program that checks the kernels; `make sanitize` runs all its checks."""

import shutil
import subprocess
from pathlib import Path

import pytest

from pentad import kernels
from tests.helpers.programs import needs_kernels

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


@needs_kernels
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_the_quick_checks_pass(tmp_path: Path) -> None:
    library = Path(kernels.__file__).with_name("_kernels.so")
    flags = ["-std=c++17", "-O1", "-w", "-pthread", f"-Wl,-rpath,{library.parent}"]
    made = [COMPILER, *flags, Path(__file__).with_name("check.cpp"), library, "-o", tmp_path / "check"]
    subprocess.run(made, check=True)  # type: ignore[arg-type]
    done = subprocess.run([tmp_path / "check", "quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
