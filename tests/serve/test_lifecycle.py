"""Workers and the server: loading on demand, full queues, deaths, signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from tests.serve.conftest import PATIENCE, Server, eventually, serving

HELLO = [{"role": "user", "content": "Hello"}]
GREEDY = {"messages": HELLO, "temperature": 0}


@pytest.fixture(scope="module")
def two(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of two models, with memory for one and a short queue, that asks for a key."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "keys").write_text("first-key\nsecond-key\n")
    shutil.copytree(tiny, folder / "other")
    arguments = ["--model", tiny, "--model", f"second={folder / 'other'}", "--memory", "900MiB", "--max-queue", 2]
    with serving(*arguments, "--api-key-file", folder / "keys", "--threads", 1, key="second-key") as started:
        yield started


def children(server: Server) -> list[int]:
    """The process ids of the workers."""
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(server.process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in listing.stdout.split()]


def test_a_key_is_needed(two: Server) -> None:
    for given in ({}, {"Authorization": "Bearer third-key"}, {"Authorization": "Bearer "}):
        reply = two.request("/v1/models", **{"Authorization": "", **given})
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
    assert two.request("/health", Authorization="").status == 200
    assert {model.id for model in two.client.models.list()} == {"tiny", "second"}


def test_a_full_queue_says_when_to_come_back(two: Server) -> None:
    with two.client.chat.completions.create(model="tiny", n=2, stream=True, **GREEDY) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as raised:
            two.client.chat.completions.create(model="tiny", max_tokens=1, **GREEDY)
        assert int(raised.value.response.headers["Retry-After"]) > 0
    with pytest.raises(openai.BadRequestError):
        two.client.chat.completions.create(model="tiny", n=3, max_tokens=1, **GREEDY)
    patient = two.client.with_options(max_retries=50)
    assert patient.chat.completions.create(model="tiny", max_tokens=1, **GREEDY).choices


def test_a_killed_worker_is_replaced(two: Server) -> None:
    stream = two.client.chat.completions.create(model="tiny", stream=True, **GREEDY)
    next(iter(stream))
    (worker,) = children(two)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="ended unexpectedly"):
        list(stream)
    health = two.request("/health")
    assert (health.status, health.json["models"]["tiny"]["state"]) in ((503, "restarting"), (200, "ready"))
    eventually(lambda: two.request("/health").status == 200)
    assert two.client.chat.completions.create(model="tiny", max_tokens=1, **GREEDY).choices
    assert 'pentad_worker_restarts_total{model="tiny"} 1.0' in two.request("/metrics").body.decode()


def test_a_model_is_loaded_when_it_is_used_and_another_unloaded(two: Server) -> None:
    with two.client.chat.completions.create(model="tiny", stream=True, **GREEDY) as stream:
        next(iter(stream))
        with pytest.raises(openai.InternalServerError, match="no memory") as raised:
            two.client.chat.completions.create(model="second", max_tokens=1, **GREEDY)
        assert raised.value.status_code == 503
    eventually(lambda: two.open_sequences() == 0)
    with pytest.raises(openai.InternalServerError, match="loading") as raised:
        two.client.chat.completions.create(model="second", max_tokens=1, **GREEDY)
    assert (raised.value.status_code, int(raised.value.response.headers["Retry-After"]) > 0) == (503, True)
    eventually(lambda: two.health()["models"]["second"]["state"] == "ready")
    assert two.client.chat.completions.create(model="second", max_tokens=1, **GREEDY).model == "second"
    assert two.health()["models"]["tiny"]["state"] == "unloaded"
    assert len(children(two)) == 1


def test_sigterm_lets_requests_finish_and_a_second_one_does_not(two: Server) -> None:
    """The last test of this server."""
    create = two.client.chat.completions.create
    short = create(model="second", stream=True, max_tokens=200, **GREEDY)
    long = create(model="second", stream=True, **GREEDY)
    chunks = [next(iter(short))]
    next(iter(long))
    workers = children(two)
    for pid in (two.process.pid, *workers):  # systemd signals all processes of a service
        os.kill(pid, signal.SIGTERM)
    chunks += list(short)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert two.process.poll() is None
    with pytest.raises(openai.APIConnectionError):
        create(model="second", max_tokens=1, **GREEDY)
    two.process.send_signal(signal.SIGTERM)
    with pytest.raises((openai.APIError, httpx2.HTTPError)):
        list(long)
    assert two.process.wait(PATIENCE) == 0
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("options", [["--model", "."], ["--model", "tiny", "--quantize", "q9"]], ids=str)
def test_a_model_that_cannot_be_loaded_ends_the_server(
    tiny: Path, tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tiny").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "pentad", "serve", "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    assert done.stderr.startswith("pentad: ")
    assert done.stderr.count("\n") == 1


def test_weights_are_quantized_while_loading(tiny: Path) -> None:
    command = [sys.executable, "-m", "pentad", "serve", "--port", "0", "--json", "--model", str(tiny)]
    with subprocess.Popen([*command, "--quantize", "q8_0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        process.terminate()
    assert ready["weights_bytes"] < (tiny / "model.safetensors").stat().st_size / 2


def test_the_front_process_imports_no_torch() -> None:
    code = "import sys, pentad.serve.app, pentad.serve.server; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
