"""Chat templates that take long hold up nobody else."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.helpers.tiny import edit_json, talking_checkpoint
from tests.serve.conftest import serving

BOMB = "{% for a in range(99999) %}{% for b in range(99999) %}{{ messages }}{% endfor %}{% endfor %}"
SLOW = [{"role": "user", "content": "x" * 200_000}]  # the limit of work grows with the messages


def test_a_template_bomb_is_refused_and_does_not_block_others(tmp_path: Path) -> None:
    talking_checkpoint(tmp_path / "bomb", max_position_embeddings=8192)
    edit_json(tmp_path / "bomb" / "tokenizer_config.json", chat_template=BOMB)
    chat = {"model": "bomb", "messages": SLOW}
    with serving("--model", tmp_path / "bomb", "--threads", 1) as server, ThreadPoolExecutor(20) as pool:
        bombs = [pool.submit(server.request, "/v1/chat/completions", chat) for _ in range(20)]
        assert server.request("/health").status == 200
        assert not all(bomb.done() for bomb in bombs)
        for bomb in bombs:
            assert (bomb.result().status, bomb.result().error["param"]) == (400, "messages")
            assert "work limit" in bomb.result().error["message"]
        assert server.request("/v1/completions", {"model": "bomb", "prompt": "a", "max_tokens": 1}).status == 200
