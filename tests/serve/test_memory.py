"""The memory that is announced before a model is loaded."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pentad
from pentad.errors import BadInput
from pentad.serve.budget import MIN_CACHE_BYTES, PROCESS_BYTES, Size, shares
from pentad.serve.worker import measure
from tests.helpers.tiny import talking_checkpoint
from tests.serve.conftest import PATIENCE

MB = 1 << 20


def test_a_model_gets_an_equal_share_or_what_it_needs() -> None:
    small, large = Size(10 * MB, MB, 256), Size(900 * MB, MB, 256)
    first, second = shares(["small", "large"], [small, large], 2000 * MB)
    assert (first.total, first.cache, first.cache_tokens) == (1000 * MB, 590 * MB, 590 * 256)
    assert second.total == 900 * MB + PROCESS_BYTES + MIN_CACHE_BYTES
    with pytest.raises(BadInput, match=r"large needs 1\.5 GB"):
        shares(["small", "large"], [small, large], 1000 * MB)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {}),
        ({"hidden_size": 64}, {"quantize": "q8_0"}),
        ({"hidden_size": 64}, {"quantize": "none"}),
        ({"head_dim": 24}, {}),
        ({"head_dim": 24}, {"dtype": "bfloat16"}),
        ({"family": "mistral", "sliding_window": 64}, {}),
    ],
    ids=str,
)
def test_the_size_by_the_headers_is_the_size_in_memory(
    tmp_path: Path, config: dict[str, Any], options: dict[str, str]
) -> None:
    talking_checkpoint(tmp_path / "tiny", **config)
    size = measure(str(tmp_path / "tiny"), dtype=options.get("dtype"), quantize=options.get("quantize"))
    model = pentad.load(tmp_path / "tiny", **options)
    assert size.weights == sum(part.nbytes for part in (*model.network.parameters(), *model.network.buffers()))
    assert (size.page, size.page_tokens) == (model.step.cache.page_bytes, model.step.cache.page_size)


def test_the_memory_is_announced_before_loading(tmp_path: Path) -> None:
    talking_checkpoint(tmp_path / "tiny")
    (tmp_path / "tiny" / "tokenizer.json").write_text("{}")
    command = [sys.executable, "-m", "pentad", "serve", "--port", "0", "--model", str(tmp_path / "tiny")]
    done = subprocess.run([*command, "--memory", "1GiB"], capture_output=True, text=True, timeout=PATIENCE)
    announced, failed = done.stderr.splitlines()
    assert re.search(r"up to 1\.1 GB: weights \d.* KV cache \d.* = [\d,]+ tokens", announced)
    assert "tokenizer.json" in failed


def test_a_quantized_model_fits_where_its_float_file_does_not(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    talking_checkpoint(tmp_path, hidden_size=256, intermediate_size=512)
    assert json.loads(config.read_text())["dtype"] == "float32"
    floats, quantized = (measure(str(tmp_path), dtype=None, quantize=type) for type in (None, "q4_0"))
    assert quantized.weights < floats.weights / 4
    needed = quantized.weights + PROCESS_BYTES + MIN_CACHE_BYTES
    assert shares(["quantized"], [quantized], needed)
    with pytest.raises(BadInput):
        shares(["floats"], [floats], needed)
