"""The tests of the `openai` package that call a server."""

from pathlib import Path

from tests.helpers.tiny import talking_checkpoint
from tests.peers.suites import run_suite, sdist
from tests.serve.conftest import serving

NAMES = ("gpt-6-astra", "gpt-3.5-turbo-instruct", "text-embedding-3-small")


def test_the_official_clients_own_tests(tmp_path: Path) -> None:
    talking_checkpoint(tmp_path, max_position_embeddings=128)
    models = [option for name in NAMES for option in ("--model", f"{name}={tmp_path}")]
    with serving(*models, "--threads", 1) as server:
        for name in NAMES[1:]:  # loads it; the client waits
            server.client.with_options(max_retries=9).embeddings.create(model=name, input="a")
        run_suite(sdist("openai"), "openai", "-o", "addopts=", "tests", TEST_API_BASE_URL=server.url)
