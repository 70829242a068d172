"""Mapped files: pages are released after use, and modified pages are kept."""

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


def test_releasing_a_view_keeps_modified_bytes_around_it(tmp_path: Path, content: torch.Tensor) -> None:
    """The modified bytes share a page with the view."""
    mapped = map_file(tmp_path / "file")
    view, written = mapped[100:20_000], mapped.numpy()  # torch doesn't notice these writes
    written[:100] = written[20_000:20_100] = 7
    drop_pages(view)
    assert torch.equal(view, content[100:20_000])
    assert (mapped[:100] == 7).all()
    assert (mapped[20_000:20_100] == 7).all()


def test_a_modified_mapping_is_not_released(tmp_path: Path, content: torch.Tensor) -> None:
    mapped = map_file(tmp_path / "file")
    mapped[5000:6000] = 7
    drop_pages(mapped)
    assert (mapped[5000:6000] == 7).all()
    assert torch.equal(mapped[6000:], content[6000:])


def test_releasing_mapped_quantized_tensors(tmp_path: Path, content: torch.Tensor) -> None:
    """Permuted rows are views of the file, so releasing its pages releases them too; a copy keeps its memory."""
    mapped = map_file(tmp_path / "file")
    rows = SIZE // 360
    whole = QuantizedTensor(mapped[: rows * 360].view(rows, 360), "q4_1", (rows, 576), mapped=True)
    permuted = whole.take_rows(torch.arange(rows).flip(0))
    blocks = permuted.rows(7, rows).blocks
    assert torch.equal(blocks, whole.blocks[: rows - 7].flip(0))
    assert permuted.mapped
    assert {part.stored.data_ptr() for part in (permuted, *whole.chunk(2))} == {whole.stored.data_ptr()}
    permuted.release()
    assert resident(tmp_path / "file") <= 8192
    assert torch.equal(permuted.blocks.flip(0), whole.blocks)
    copy = QuantizedTensor(whole.blocks.clone(), "q4_1", whole.shape)
    copy.release()
    assert torch.equal(copy.blocks, whole.blocks)
