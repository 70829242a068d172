"""Memory of mapped files: released after use, without loss."""

import sys
from pathlib import Path

import pytest
import torch

from pentad.weights.mapped import drop_pages, map_file
from pentad.weights.quantized import QuantizedTensor
from tests.helpers.resident import resident

SIZE = 1 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def content(tmp_path: Path) -> torch.Tensor:
    content = torch.randint(0, 256, (SIZE,), dtype=torch.uint8)
    (tmp_path / "file").write_bytes(content.numpy().tobytes())
    return content


def test_pages_are_released_and_read_again(tmp_path: Path, content: torch.Tensor) -> None:
    mapped = map_file(tmp_path / "file")
    assert torch.equal(mapped, content)
    assert resident(tmp_path / "file") == SIZE
    drop_pages(mapped[10_000:-10_000])
    assert 20_000 <= resident(tmp_path / "file") <= 32_768
    drop_pages(mapped[:100])
    assert torch.equal(mapped, content)


def test_neighbors_are_left_alone(tmp_path: Path, content: torch.Tensor) -> None:
    """Bytes written beside a view, on a page that both share, are kept."""
    mapped = map_file(tmp_path / "file")
    view, written = mapped[100:20_000], mapped.numpy()  # writes that torch does not count
    written[:100] = written[20_000:20_100] = 7
    drop_pages(view)
    assert torch.equal(view, content[100:20_000])
    assert (mapped[:100] == 7).all()
    assert (mapped[20_000:20_100] == 7).all()


def test_a_mapping_that_was_written_to_is_kept(tmp_path: Path, content: torch.Tensor) -> None:
    mapped = map_file(tmp_path / "file")
    mapped[5000:6000] = 7
    drop_pages(mapped)
    assert (mapped[5000:6000] == 7).all()
    assert torch.equal(mapped[6000:], content[6000:])


def test_quantized_tensors_that_are_mapped(tmp_path: Path, content: torch.Tensor) -> None:
    """Rows in any order are views, so releasing the file's pages releases all of them; a copy keeps its memory."""
    mapped = map_file(tmp_path / "file")
    rows = SIZE // 360
    whole = QuantizedTensor(mapped[: rows * 360].view(rows, 360), "q4_1", (rows, 576), mapped=True)
    taken = whole.take_rows(torch.arange(rows).flip(0))
    blocks = taken.rows(7, rows).blocks
    assert torch.equal(blocks, whole.blocks[: rows - 7].flip(0))
    assert taken.mapped
    assert {part.stored.data_ptr() for part in (taken, *whole.chunk(2))} == {whole.stored.data_ptr()}
    taken.release()
    assert resident(tmp_path / "file") <= 8192
    assert torch.equal(taken.blocks.flip(0), whole.blocks)
    copy = QuantizedTensor(whole.blocks.clone(), "q4_1", whole.shape)
    copy.release()
    assert torch.equal(copy.blocks, whole.blocks)
