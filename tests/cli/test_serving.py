"""`pentad serve`: its options; tests/serve has what it does."""

import socket
from pathlib import Path

import pytest

from tests.helpers.tiny import talking_checkpoint


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "nobody"], "nobody"),
        (["--memory", "lots"], "lots"),
        (["--memory", "1MB", "--model", "{folder}"], "--memory"),
        (["--model", "{folder}", "--model", "{folder}"], "OTHER=NAME"),
        (["--api-key-file", "/no/such/file"], "/no/such/file"),
        (["--api-key-file", "/dev/null"], "no key"),
        (["--port", "70000"], "--port"),
        (["--max-queue", "0"], "--max-queue"),
    ],
)
def test_bad_options_are_one_line(tmp_path: Path, pentad, arguments: list[str], named: str) -> None:
    talking_checkpoint(tmp_path)
    done = pentad("serve", *(argument.format(folder=tmp_path) for argument in arguments))
    assert done.code == 2
    assert named in done.error


def test_a_port_that_is_used_is_named(tmp_path: Path, pentad) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = pentad("serve", "--model", tmp_path, "--port", port)
    assert done.code == 1
    assert f"127.0.0.1 port {port}" in done.error
