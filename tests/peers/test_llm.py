"""The `llm` command talks to `pentad serve` as to any server of OpenAI's API."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.peers import suites  # noqa: F401 - skips these tests if the peers aren't installed
from tests.serve.conftest import Server

MODELS = """
- {{model_id: chat, model_name: tiny, api_base: "{url}"}}
- {{model_id: text, model_name: tiny, api_base: "{url}", completion: true}}
"""
OPTIONS = ("--no-log", "--key", "none", "-o", "temperature", "0", "-o", "max_tokens", "9")


@pytest.mark.parametrize("streaming", [(), ("--no-stream",)])
def test_the_command_prints_the_models_text(server: Server, tmp_path: Path, streaming: tuple[str, ...]) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(MODELS.format(url=server.url))

    def ask(model: str) -> str:
        command = [sys.executable, "-m", "llm", "prompt", "Hello", "-m", model, *OPTIONS, *streaming]
        home = os.environ | {"LLM_USER_PATH": str(tmp_path)}
        return subprocess.run(command, env=home, capture_output=True, check=True).stdout.decode().strip()

    options = {"model": "tiny", "max_tokens": 9, "temperature": 0}
    chat = server.client.chat.completions.create(messages=[{"role": "user", "content": "Hello"}], **options)
    assert ask("chat") == chat.choices[0].message.content.strip()
    assert ask("text") == server.client.completions.create(prompt="Hello", **options).choices[0].text.strip()
