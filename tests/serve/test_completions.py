"""/v1/completions, through the official client."""

from pathlib import Path

import openai
import pytest

from pentad.loading import load
from tests.serve.conftest import Server

GREEDY = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def alone(tiny: Path):
    """The same model in this process."""
    return load(tiny)


def test_texts_and_token_ids_are_continued(server: Server, alone) -> None:
    expected = [alone.complete(text, temperature=0, max_tokens=12).text for text in ("One", "Two")]
    create = server.client.completions.create
    for prompt in (["One", "Two"], [list(b"One"), list(b"Two")]):
        reply = create(**GREEDY, prompt=prompt, max_tokens=12)
        assert [choice.text for choice in reply.choices] == expected
        assert [choice.index for choice in reply.choices] == [0, 1]
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (6, 24)
    for single in ("One", list(b"One")):
        assert create(**GREEDY, prompt=single, max_tokens=12).choices[0].text == expected[0]
    assert create(**GREEDY, prompt="One").usage.completion_tokens == 16  # as OpenAI's default


def test_choices_of_several_prompts(server: Server) -> None:
    create = server.client.completions.create
    options = {"model": "tiny", "seed": 3, "max_tokens": 8}
    reply = create(**options, prompt=["One", "Two"], n=2)
    texts = [choice.text for choice in reply.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert texts[2:] == [choice.text for choice in create(**options, prompt="Two", n=2).choices]
    streamed = [""] * 4
    for chunk in create(**options, prompt=["One", "Two"], n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_scores_the_prompt(server: Server, alone, stream: bool) -> None:
    text, options = "What a day", {"temperature": 0, "max_tokens": 3}
    reply = server.client.completions.create(model="tiny", prompt=text, echo=True, logprobs=2, stream=stream, **options)
    choices = [part.choices[0] for part in reply] if stream else [reply.choices[0]]
    tokens, logprobs, tops, offsets = (
        [one for choice in choices for one in getattr(choice.logprobs, name)]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    )
    assert "".join(choice.text for choice in choices) == text + alone.complete(text, **options).text
    assert tokens[: len(text)] == list(text)
    assert logprobs[0] is tops[0] is None
    assert sum(logprobs[1 : len(text)]) == pytest.approx(alone.score(text).log_likelihood, abs=1e-4)
    assert offsets[: len(text) + 1] == list(range(len(text) + 1))
    for token, logprob, top in list(zip(tokens, logprobs, tops, strict=True))[1:]:
        assert top[token] == logprob
        assert len(top) in (2, 3)


def test_a_prompt_is_scored_without_generating(server: Server, alone) -> None:
    """As lm-evaluation-harness asks, but with more than one prompt."""
    texts = ["The cat sat", "x"]
    reply = server.client.completions.create(**GREEDY, prompt=texts, max_tokens=0, echo=True, logprobs=1)
    assert [choice.text for choice in reply.choices] == texts
    assert [choice.finish_reason for choice in reply.choices] == ["length"] * 2
    likelihood = sum(reply.choices[0].logprobs.token_logprobs[1:])
    assert likelihood == pytest.approx(alone.score(texts[0]).log_likelihood, abs=1e-4)
    assert reply.choices[1].logprobs.token_logprobs == [None]
    assert reply.usage.completion_tokens == 0


def test_parts_of_characters_are_named_as_bytes(server: Server) -> None:
    reply = server.client.completions.create(**GREEDY, prompt="é", max_tokens=0, echo=True, logprobs=0)
    assert reply.choices[0].text == "é"
    assert reply.choices[0].logprobs.tokens == ["bytes:\\xc3", "bytes:\\xa9"]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[1], []]}, "prompt.1"),
        ({"prompt": [5, 264]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": ["a"] * 100, "n": 2}, "n"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_a_refusal_names_the_field(server: Server, options: dict, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        server.client.completions.create(**{**GREEDY, "prompt": "hi", **options})
    assert raised.value.param == param


def test_a_stream_may_count_tokens_in_each_event(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 3, "stream": True, "stream_options": options}
    events = [event.usage for event in server.client.completions.create(**body)]
    assert None not in events
    counts = [event.completion_tokens for event in events]
    assert counts == sorted(counts)
    assert (counts[-1], {event.prompt_tokens for event in events}) == (3, {5})


def test_a_text_goes_on_after_its_end_if_that_is_ignored(server: Server) -> None:
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 3, "temperature": 0, "logit_bias": {"256": 100}}
    ends = server.client.completions.create(**body)
    goes_on = server.client.completions.create(**body, extra_body={"ignore_eos": True})
    assert ends.choices[0].finish_reason == "stop"
    assert (goes_on.choices[0].finish_reason, goes_on.usage.completion_tokens) == ("length", 3)
