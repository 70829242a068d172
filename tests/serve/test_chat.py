"""/v1/chat/completions, through the official client and through plain HTTP."""

from pathlib import Path

import openai
import pytest

from pentad.loading import load
from tests.serve.conftest import Server, eventually

HELLO = [{"role": "user", "content": "Hello"}]
GREEDY = {"model": "tiny", "messages": HELLO, "temperature": 0}


@pytest.fixture(scope="module")
def alone(tiny: Path):
    """The same model in this process."""
    return load(tiny)


def test_an_answer_is_the_models(server: Server, alone) -> None:
    reply = server.client.chat.completions.create(**GREEDY, max_tokens=40)
    expected = alone.chat(HELLO, temperature=0, max_tokens=40)
    assert reply.model == "tiny"
    assert reply.object == "chat.completion"
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == expected.text
    assert reply.choices[0].finish_reason == expected.finish_reason == "length"
    assert reply.usage.prompt_tokens == expected.prompt_tokens
    assert reply.usage.completion_tokens == 40
    assert reply.usage.total_tokens == expected.prompt_tokens + 40


def test_a_stream_joins_to_the_answer(server: Server) -> None:
    whole = server.client.chat.completions.create(**GREEDY, max_tokens=40)
    chunks = list(
        server.client.chat.completions.create(
            **GREEDY, max_tokens=40, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert [c.choices[0].delta.role for c in chunks[:2]] == ["assistant", None]
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_a_seed_repeats_a_text_and_choices_differ(server: Server) -> None:
    def texts() -> list[str]:
        reply = server.client.chat.completions.create(model="tiny", messages=HELLO, n=3, seed=5, max_tokens=30)
        return [choice.message.content for choice in reply.choices]

    first = texts()
    assert len(set(first)) == 3
    assert texts() == first


def test_a_bias_changes_the_text(server: Server) -> None:
    reply = server.client.chat.completions.create(**GREEDY, max_tokens=5, logit_bias={"65": 100})
    assert reply.choices[0].message.content == "AAAAA"  # each token is a byte
    refused = server.request("/v1/chat/completions", {**GREEDY, "logit_bias": {"264": 1}})
    assert refused.status == 400
    assert "264" in refused.error["message"]


def test_stop_strings_end_the_text_across_tokens(server: Server) -> None:
    text = server.client.chat.completions.create(**GREEDY, max_tokens=40).choices[0].message.content
    stop = text[10:14]  # each token is a byte
    for stream in (False, True):
        reply = server.client.chat.completions.create(**GREEDY, max_tokens=40, stop=[stop, "never"], stream=stream)
        if stream:
            choices = [chunk.choices[0] for chunk in reply]
            assert "".join(choice.delta.content or "" for choice in choices) == text[: text.index(stop)]
            assert choices[-1].finish_reason == "stop"
        else:
            assert reply.choices[0].message.content == text[: text.index(stop)]
            assert reply.choices[0].finish_reason == "stop"


def test_logprobs_are_those_of_the_model(server: Server, alone) -> None:
    reply = server.client.chat.completions.create(**GREEDY, max_tokens=5, logprobs=True, top_logprobs=2)
    expected = alone.chat(HELLO, temperature=0, max_tokens=5, logprobs=2).logprobs
    content = reply.choices[0].logprobs.content
    assert [one.logprob for one in content] == pytest.approx([one.logprob for one in expected], abs=1e-5)
    assert [bytes(one.bytes) for one in content] == [alone.tokenizer.token_bytes(one.token_id) for one in expected]
    assert [len(one.top_logprobs) for one in content] == [2] * 5
    assert content[0].top_logprobs[0].logprob == content[0].logprob  # greedy


def test_cached_tokens_are_those_of_one_prompt(server: Server) -> None:
    messages = [{"role": "user", "content": "A question that was asked before. " * 20}]
    usages = [
        server.client.chat.completions.create(model="tiny", messages=messages, n=3, max_tokens=2, seed=1).usage
        for _ in range(2)
    ]
    first, second = (usage.prompt_tokens_details.cached_tokens for usage in usages)
    assert first < second < usages[0].prompt_tokens == usages[1].prompt_tokens


def test_a_closed_stream_frees_its_sequences(server: Server) -> None:
    stream = server.client.chat.completions.create(**GREEDY, n=2, stream=True)
    next(iter(stream))
    assert server.open_sequences() == 2
    stream.close()
    eventually(lambda: server.open_sequences() == 0)
    assert server.client.chat.completions.create(**GREEDY, max_tokens=1).choices


def test_a_client_that_gives_up_waiting_frees_its_sequence(server: Server) -> None:
    with pytest.raises(openai.APITimeoutError):
        server.client.with_options(timeout=0.3).chat.completions.create(**GREEDY)
    eventually(lambda: server.open_sequences() == 0)


def test_models_are_listed(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").owned_by == "pentad"
    with pytest.raises(openai.NotFoundError) as raised:
        server.client.models.retrieve("../../etc/passwd")
    assert raised.value.code == "model_not_found"
