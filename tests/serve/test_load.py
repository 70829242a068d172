"""Many clients at once, for a short time; `make load` runs them for five minutes."""

from pathlib import Path

from tests.helpers.tiny import talking_checkpoint
from tests.serve.conftest import serving
from tests.serve.load import Load


def test_two_hundred_clients(tmp_path: Path) -> None:
    """The KV cache is so small that the clients fill it at once, and requests preempt each other."""
    sizes = {"head_dim": 64, "num_key_value_heads": 4, "max_position_embeddings": 4096}
    talking_checkpoint(tmp_path / "tiny", **sizes)
    with serving("--model", tmp_path / "tiny", "--threads", 1, "--max-queue", 150, "--memory", "550MiB") as server:
        load = Load(server, 2000, seconds=8)
        load.run(200)
        assert min(load.outcomes[outcome] for outcome in ("complete", "cancelled", "refused")) > 10
        load.check_pages()
        load.check_memory()
