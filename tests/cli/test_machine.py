"""`pentad env` and `pentad bench`."""

import json
import platform
from pathlib import Path

import torch

import pentad as package
from pentad import kernels


def test_env(pentad, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PENTAD_CACHE", str(tmp_path))
    facts = pentad("env", "--json").json
    assert facts["pentad"] == package.__version__
    assert facts["python"].startswith(platform.python_version())
    assert facts["packages"]["torch"] == torch.__version__
    assert {"torch", "safetensors", "tokenizers", "typer"} <= set(facts["packages"])
    assert facts["missing"] == []
    assert facts["threads"] == torch.get_num_threads()
    assert facts["devices"][0] == "cpu"
    assert facts["caches"]["pentad"] == str(tmp_path)
    text = pentad("env").out
    assert torch.__version__ in text
    assert str(tmp_path) in text


def test_bench(pentad, smollm2: Path) -> None:
    grid = ["--prompt", "3,5", "--generate", "2", "--batch", "1,2", "--depth", "0,4", "--repeat", "2"]
    done = pentad("bench", smollm2, *grid, "--json")
    assert (done.code, done.err) == (0, "")
    rows = [json.loads(line) for line in done.out.splitlines()]
    cases = [(row["batch"], row["depth"], row["test"]) for row in rows]
    assert cases == [(b, d, t) for b in (1, 2) for d in (0, 4) for t in ("pp3", "pp5", "tg2")]
    for row in rows:
        assert 0 < row["slowest"] <= row["tokens_per_second"] <= row["fastest"]
        assert (row["model"], row["repeat"]) == (str(smollm2), 2)
        assert row["runs"].startswith("by the kernels") if kernels.isas() else kernels.reason() in row["runs"]
        assert (row["dtype"], row["device"]) == ("float32" if kernels.isas() else "bfloat16", "cpu")


def test_bench_as_a_table(pentad, smollm2: Path) -> None:
    done = pentad("bench", "--model", smollm2, "--prompt", "600", "--generate", "0", "--repeat", "1")
    header, row = done.out.splitlines()
    assert header.split()[:4] == ["test", "batch", "depth", "tokens/s"]
    assert row.split()[:3] == ["pp600", "1", "0"]


def test_bench_outside_the_context(pentad, smollm2: Path) -> None:
    done = pentad("bench", smollm2, "--context", "100", "--depth", "60", "--generate", "41", "--prompt", "0", "--json")
    assert done.code == 2
    assert "101 tokens" in done.error


def test_bench_refuses_what_memory_cannot_hold(pentad, smollm2: Path) -> None:
    done = pentad("bench", smollm2, "--batch", "10000000", "--prompt", "0", "--generate", "1")
    assert done.code == 2
    assert "--batch 10000000" in done.error
    assert done.error.count("GB") + done.error.count("TB") == 2
