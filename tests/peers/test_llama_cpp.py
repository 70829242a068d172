"""The tests of llama.cpp's server that use OpenAI's API."""

from pathlib import Path

from tests.peers.suites import run_suite, sdist


def test_the_tests_of_llama_cpps_server(smollm2: Path) -> None:
    folder = sdist("llama_cpp_python") / "vendor/llama.cpp/tools/server/tests"
    run_suite(folder, "llama_cpp", "-p", "llama_server", PEERS_MODEL=str(smollm2))
