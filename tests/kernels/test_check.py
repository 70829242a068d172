"""The quick form of the C++ program that checks the kernels; `make sanitize` runs the whole program."""

import shutil
import subprocess
from pathlib import Path

import pytest

from pentad import kernels
from tests.helpers.programs import needs_kernels

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


@needs_kernels
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_the_program_finds_nothing(tmp_path: Path) -> None:
    library = Path(kernels.__file__).with_name("_kernels.so")
    flags = ["-std=c++17", "-O1", "-w", "-pthread", f"-Wl,-rpath,{library.parent}"]
    made = [COMPILER, *flags, Path(__file__).with_name("check.cpp"), library, "-o", tmp_path / "check"]
    subprocess.run(made, check=True)  # type: ignore[arg-type]
    done = subprocess.run([tmp_path / "check", "quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
