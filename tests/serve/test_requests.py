"""What is refused, and how; each test leaves the server as it was."""

import json
import socket
from typing import Any

import jsonschema
import pytest

from tests.serve.conftest import Server, eventually

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


@pytest.fixture(autouse=True)
def _unaffected(server: Server):
    """The next request is answered, and no sequence is left."""
    yield
    assert server.request("/v1/chat/completions", CHAT).status == 200
    eventually(lambda: server.open_sequences() == 0)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"logit_bias": {"50": 101}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias"),
        ({"store": True}, "store"),
        ({"model": 5}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "hi", "mood": "bad"}]}, "messages.0.mood"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": 10**12}, "messages"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": ["x"] * 5000}, "stop"),
        ({"stop": "x" * 5000}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ],
)
def test_a_field_that_is_wrong_is_named(server: Server, change: dict[str, Any], param: str) -> None:
    reply = server.request("/v1/chat/completions", CHAT | change)
    assert reply.status == 400
    assert reply.error["param"] == param
    assert reply.error["type"] == "invalid_request_error"


def test_a_missing_field_is_named(server: Server) -> None:
    for missing in ("model", "messages"):
        reply = server.request("/v1/chat/completions", {k: v for k, v in CHAT.items() if k != missing})
        assert (reply.status, reply.error["param"]) == (400, missing)


def test_fields_without_effect_and_nulls_are_accepted(server: Server) -> None:
    neutral = {"user": "me", "store": False, "logit_bias": {}, "response_format": {"type": "text"}, "metadata": {}}
    nulls = dict.fromkeys(("n", "stop", "seed", "temperature", "logprobs", "stream", "stream_options", "tools"))
    del nulls["tools"]
    assert server.request("/v1/chat/completions", CHAT | neutral | nulls).status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b"[" * 100_000,
        b'{"messages": ' + b'{"a":' * 100_000,
        json.dumps(CHAT)[:-1].encode() + b', "temperature": NaN}',
        json.dumps(CHAT)[:-1].encode() + b', "temperature": 1e999}',
        json.dumps(CHAT)[:-1].encode() + b', "temperature": ' + b"9" * 10_000 + b"}",
        json.dumps(CHAT)[:-1].encode() + b', "seed": ' + b"9" * 10_000 + b"}",
    ],
)
def test_a_body_that_is_not_the_expected_json(server: Server, body: bytes) -> None:
    reply = server.request("/v1/chat/completions", body)
    assert reply.status == 400
    assert len(reply.error["message"]) < 500


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(server: Server) -> None:
    long = [{"role": "user", "content": "x" * 9000}]
    reply = server.request("/v1/chat/completions", CHAT | {"messages": long})
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert {"9018", "8192"} <= set(reply.error["message"].split())
    reply = server.request("/v1/chat/completions", CHAT | {"max_tokens": 8180})
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert {"8180", "8192"} <= set(reply.error["message"].split())


def test_a_million_tokens_are_refused_before_they_are_encoded(server: Server) -> None:
    million = "word " * 1_000_000
    assert (
        server.request("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": million}]}).status
        == 400
    )
    reply = server.request("/v1/completions", {"model": "tiny", "prompt": [5] * 1_000_000})
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("name", ["nobody", "../tiny", "/etc/passwd", "tiny/../tiny", "tiny\r\nX-Evil: 1", "x" * 900])
def test_a_model_that_is_not_served(server: Server, name: str) -> None:
    reply = server.request("/v1/chat/completions", CHAT | {"model": name})
    assert (reply.status, reply.error["code"], reply.error["param"]) == (404, "model_not_found", "model")
    assert "X-Evil" not in reply.headers


def test_unknown_routes_and_methods(server: Server) -> None:
    assert server.request("/v1/nonsense").status == 404
    assert server.request("/v1/nonsense").error["type"] == "invalid_request_error"
    assert server.request("/v1/chat/completions").status == 405
    assert server.request("/v1/chat/completions", CHAT, **{"Content-Type": "text/plain"}).status == 415


def test_the_bodies_are_described(server: Server) -> None:
    document = server.request("/openapi.json").json
    schemas = document["components"]["schemas"]
    for path in ("chat/completions", "completions", "responses", "embeddings"):
        content = document["paths"][f"/v1/{path}"]["post"]["requestBody"]["content"]["application/json"]
        name = content["schema"]["$ref"].removeprefix("#/components/schemas/")
        assert "model" in schemas[name]["required"]
    assert schemas["ChatBody"]["additionalProperties"] is False


def test_other_hosts_are_refused(server: Server) -> None:
    port = server.url.split(":")[2].split("/")[0]
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.nip.io:80"):
        reply = server.request("/v1/models", Host=host)
        assert (reply.status, reply.error["type"]) == (403, "invalid_request_error")
    for host in ("localhost", f"localhost:{port}", "127.0.0.1", f"[::1]:{port}"):
        assert server.request("/v1/models", Host=host).status == 200


def test_web_pages_are_not_allowed_by_default(server: Server) -> None:
    reply = server.request("/v1/models", Origin="https://evil.example")
    assert "Access-Control-Allow-Origin" not in reply.headers


def connect(server: Server, data: bytes) -> socket.socket:
    host, port = server.root.removeprefix("http://").split(":")
    opened = socket.create_connection((host, int(port)), timeout=60)
    opened.sendall(data)
    return opened


def head(length: int, *more: str) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", f"Content-Length: {length}", *more]
    return "\r\n".join([*lines, "Content-Type: application/json", "", ""]).encode()


def test_a_large_body_is_refused_before_it_is_read(server: Server) -> None:
    with connect(server, head(100_000_000)) as opened:  # and no body follows
        assert opened.recv(1000).startswith(b"HTTP/1.1 413")
    assert server.request("/v1/chat/completions", b" " * 20_000_000, Connection="close").status == 413
    with connect(server, head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")) as opened:
        chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        opened.sendall(chunk * 9)
        assert opened.recv(1000).startswith(b"HTTP/1.1 413")


def test_half_a_request_and_slow_headers_hold_nothing(server: Server) -> None:
    whole = json.dumps(CHAT).encode()
    with connect(server, head(len(whole)) + whole[:10]), connect(server, b"POST /v1/chat"), connect(server, b""):
        assert server.request("/v1/chat/completions", CHAT).status == 200
    with pytest.raises(ConnectionError), connect(server, b"GET / HTTP/1.1\r\nX: " + b"y" * 1_000_000) as opened:
        opened.recv(1000)


def test_a_client_that_closes_without_reading_frees_its_sequences(server: Server) -> None:
    body = json.dumps(CHAT | {"stream": True, "n": 4, "max_tokens": 8000, "temperature": 0}).encode()
    with connect(server, head(len(body)) + body):
        eventually(lambda: server.open_sequences() == 4)


def test_a_storm_of_cancellations(server: Server) -> None:
    body = json.dumps(CHAT | {"max_tokens": 8000, "temperature": 0}).encode()
    for _ in range(5):
        opened = [connect(server, head(len(body)) + body) for _ in range(20)]
        for one in opened:
            one.close()
    eventually(lambda: server.open_sequences() == 0)


def test_metrics(server: Server) -> None:
    def values() -> dict[str, float]:
        lines = server.request("/metrics").body.decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = values()
    assert server.request("/v1/chat/completions", CHAT | {"max_tokens": 7, "temperature": 0}).status == 200
    after = values()

    def growth(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert growth('pentad_generated_tokens_total{model="tiny"}') == 7
    assert growth('pentad_prompt_tokens_total{model="tiny"}') == 23
    assert growth('pentad_time_to_first_token_seconds_count{model="tiny"}') == 1
    assert growth('pentad_time_between_tokens_seconds_count{model="tiny"}') == 6
    assert growth('pentad_requests_total{route="/v1/chat/completions",status="200"}') == 1
    assert after['pentad_decoding_sequences{model="tiny"}'] == after['pentad_waiting_sequences{model="tiny"}'] == 0


def test_replies_are_as_described(server: Server) -> None:
    document = server.request("/openapi.json").json
    completion = {"model": "tiny", "prompt": "Hello", "max_tokens": 2}
    for path, body in [
        ("chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2}),
        ("completions", completion | {"logprobs": 2, "echo": True}),
        ("completions", completion | {"n": 0}),
        ("responses", {"model": "tiny", "input": "Hello", "max_output_tokens": 2}),
        ("embeddings", {"model": "tiny", "input": "Hello"}),
    ]:
        reply = server.request(f"/v1/{path}", body)
        described = document["paths"][f"/v1/{path}"]["post"]["responses"]["200" if reply.status == 200 else "default"]
        schema = described["content"]["application/json"]["schema"]
        jsonschema.validate(reply.json, {**schema, "components": document["components"]})
