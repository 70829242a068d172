"""What a conversion takes in memory, and that one which takes too much is refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pentad import weights
from pentad.convert import WORKING_BYTES, conversion_bytes, convert
from pentad.errors import BadInput
from pentad.upcycle import Upcycling
from tests.helpers.conversions import WIDE
from tests.helpers.gguf_llama import write_gguf
from tests.helpers.tiny import tiny_checkpoint, tiny_peer


def memory_of(source: Path, format: str, upcycle: Upcycling | None = None) -> int:
    return conversion_bytes(weights.open(source), format, upcycle)


def test_the_memory_of_a_conversion_is_that_of_its_largest_rule(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "dense", **WIDE)
    tiny_checkpoint(tmp_path / "mixture", family="mixtral", num_local_experts=4, **WIDE)
    write_gguf(tmp_path / "q4_0.gguf", tiny_peer(**WIDE), "Q4_0")
    matrix, square = 64 * 96 * 4, 64 * 64 * 4
    assert memory_of(tmp_path / "dense", "hf") == 0  # tensors are views of the mapped file
    assert memory_of(tmp_path / "dense", "gguf") == square  # the rows of queries are permuted
    assert memory_of(tmp_path / "mixture", "gguf") == 4 * matrix  # experts are stacked
    assert memory_of(tmp_path / "q4_0.gguf", "gguf") == 0
    routers = 8 * 64 * 4
    assert memory_of(tmp_path / "dense", "hf", Upcycling()) == routers
    assert memory_of(tmp_path / "q4_0.gguf", "hf", Upcycling()) == matrix  # one dense matrix in float32


MEMORY = """
import re, sys
from pathlib import Path
from pentad.convert import convert
from pentad.weights.cache import Progress

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

class Measured(Progress):
    peak = 0

    def advance(self, n):
        self.peak = max(self.peak, anonymous())

folder = Path(sys.argv[1])
convert(folder / "small", folder / "small.gguf", to="gguf")  # imports all that a conversion needs
before, measured = anonymous(), Measured()
convert(folder / "a", folder / "a.gguf", to="gguf", progress=measured)
print(measured.peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_estimated_memory_is_what_a_conversion_takes(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 1, "num_local_experts": 8}
    tiny_checkpoint(tmp_path / "small", family="mixtral")
    tiny_checkpoint(tmp_path / "a", family="mixtral", **sizes)
    run = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, check=True)
    expected = 8 * 1024 * 2048 * 4
    assert memory_of(tmp_path / "a", "gguf") == expected
    assert 0.7 * expected < int(run.stdout) < expected + WORKING_BYTES
    shutil.rmtree(tmp_path)


def test_a_conversion_that_does_not_fit_into_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint(tmp_path / "a", family="mixtral", num_local_experts=4)
    needed = memory_of(tmp_path / "a", "gguf") + WORKING_BYTES
    monkeypatch.setattr("pentad.convert.available_memory", lambda device: needed - 1)
    with pytest.raises(BadInput, match=r"needs 0\.1 GB of memory, and 0\.1 GB are available"):
        convert(tmp_path / "a", tmp_path / "b.gguf", to="gguf")
    assert not list(tmp_path.glob("b*"))
    monkeypatch.setattr("pentad.convert.available_memory", lambda device: needed)
    convert(tmp_path / "a", tmp_path / "b.gguf", to="gguf")
