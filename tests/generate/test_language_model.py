"""`LanguageModel`'s methods, on a tiny model whose tokens are bytes."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pentad
import pentad.generate.engine
import pentad.generate.scheduler
from pentad.errors import BadInput, PentadError
from pentad.generate import LanguageModel
from pentad.generate.engine import Engine
from tests.helpers.tiny import (
    END,
    assert_equal_logits,
    logits_of,
    pages_of_requests,
    peer_logits,
    random_ids,
    talking_checkpoint,
)

TEXT = "The quick brown fox jumps over the lazy dog."
END_ID = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("talking")).folder


@pytest.fixture
def model(folder: Path) -> LanguageModel:
    return pentad.load(folder)


def test_complete(model: LanguageModel) -> None:
    done = model.complete(TEXT, temperature=0, max_tokens=8)
    assert done.prompt_token_ids == list(TEXT.encode())
    assert done.prompt_tokens == len(TEXT)
    assert done.completion_tokens == len(done.token_ids) <= 8
    assert done.text == model.tokenizer.decode(done.token_ids)
    assert done.finish_reason in ("length", "stop")
    assert set(done.seconds) == {"load", "prefill", "decode"}
    assert all(seconds >= 0 for seconds in done.seconds.values())
    assert done.logprobs is None
    ids = done.prompt_token_ids + done.token_ids
    expected = logits_of(model.network, ids).argmax(1)[len(TEXT) - 1 : -1]
    assert done.token_ids == expected.tolist()


def test_batched_prompts_give_the_same_tokens_as_single_ones(folder: Path) -> None:
    prompts = ["a", TEXT, "Hello", "a", 20 * "xyz "]
    for options in ({"temperature": 0}, {"seed": 11, "temperature": 1.0, "top_p": 1.0}):
        batched = pentad.load(folder).complete(prompts, max_tokens=15, **options)
        single = [pentad.load(folder).complete(p, max_tokens=15, **options) for p in prompts]
        assert [c.token_ids for c in batched] == [c.token_ids for c in single]
        assert [c.prompt_token_ids for c in batched] == [list(p.encode()) for p in prompts]
        assert [c.text for c in batched] == [c.text for c in single]
    assert pentad.load(folder).complete([]) == []


def test_only_equal_seeds_give_equal_tokens(model: LanguageModel) -> None:
    def ids(**options: Any) -> list[int]:
        return model.complete("a", max_tokens=20, temperature=1.5, top_p=1.0, **options).token_ids

    assert ids(seed=5) == ids(seed=5) != ids(seed=6)
    assert len({tuple(ids()) for _ in range(3)}) == 3


def test_a_stream_yields_the_completions_text(model: LanguageModel) -> None:
    done = model.complete(TEXT, temperature=0, max_tokens=20)
    stream = model.stream(TEXT, temperature=0, max_tokens=20)
    assert "".join(stream) == done.text == stream.completion.text
    assert stream.completion.token_ids == done.token_ids
    assert stream.completion.finish_reason == done.finish_reason
    assert list(stream) == []


def test_leaving_a_stream_frees_its_pages(model: LanguageModel) -> None:
    with model.stream(TEXT, temperature=0, max_tokens=50) as stream:
        first = next(stream)
    completion = stream.completion
    assert completion.finish_reason == "interrupted"
    assert completion.text.startswith(first)
    assert 0 < completion.completion_tokens < 50
    assert pages_of_requests(model) == 0
    assert list(stream) == []
    assert model.open_requests == 0


def test_an_interrupt_frees_all_requests(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while several prompts are running."""
    step, steps = Engine.step, 0

    def interrupted(engine: Engine) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.complete([TEXT, "a", "b"], max_tokens=30, temperature=0)
    monkeypatch.undo()
    assert pages_of_requests(model) == 0
    assert model.open_requests == 0
    assert model.complete(TEXT, temperature=0, max_tokens=3).token_ids


def test_interleaved_streams(model: LanguageModel, folder: Path) -> None:
    single = [pentad.load(folder).complete(p, temperature=0, max_tokens=9).text for p in ("a", "b")]
    one, two = (model.stream(p, temperature=0, max_tokens=9) for p in ("a", "b"))
    texts = ["", ""]
    texts[0] += next(one)
    texts[1] += "".join(two)
    texts[0] += "".join(one)
    assert texts == single
    assert pages_of_requests(model) == 0


def test_a_stop_string_across_tokens(model: LanguageModel) -> None:
    whole = model.complete(TEXT, temperature=0, max_tokens=30)
    pairs = [i for i in range(3, 25) if whole.text[i : i + 2].isascii()]
    stop = whole.text[pairs[0] : pairs[0] + 2]  # two tokens: a token is a byte
    at = whole.text.find(stop)
    stopped = model.complete(TEXT, temperature=0, max_tokens=30, stop=["never", stop])
    assert stopped.text == whole.text[:at]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    assert stopped.completion_tokens < 30
    same = model.complete(TEXT, temperature=0, max_tokens=30, stop=stop)
    assert same.text == stopped.text
    stream = model.stream(TEXT, temperature=0, max_tokens=30, stop=stop)
    assert "".join(stream) == stopped.text


def test_an_end_token_is_not_part_of_the_reply(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.tokenizer.eos_ids[0] == END_ID
    whole = model.complete(TEXT, temperature=0, max_tokens=12).token_ids
    monkeypatch.setattr(model.tokenizer, "eos_ids", (END_ID, whole[5]))
    ended = model.complete(TEXT, temperature=0, max_tokens=12)
    assert ended.token_ids == whole[: whole.index(whole[5])]
    assert ended.finish_reason == "stop"


def test_chat_renders_the_template(model: LanguageModel) -> None:
    reply = model.chat("hi", temperature=0, max_tokens=3)
    expected = [*b"[user]hi", END_ID, *b"[assistant]"]
    assert reply.prompt_token_ids == expected == model.chat_ids("hi")
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    expected = [*b"[system]s", END_ID, *expected]
    assert model.chat(messages, temperature=0, max_tokens=3).prompt_token_ids == expected
    stream = model.stream(messages, temperature=0, max_tokens=3)
    assert stream.completion.prompt_token_ids == expected
    stream.close()


def test_control_strings_are_text_unless_special(model: LanguageModel) -> None:
    text = f"a{END}"
    plain = model.complete(text, max_tokens=1).prompt_token_ids
    assert plain == list(text.encode())
    assert model.complete(text, special=True, max_tokens=1).prompt_token_ids == [97, END_ID]


def test_the_context_bounds_prompt_and_reply(folder: Path) -> None:
    model = pentad.load(folder, context=50)
    assert model.context_length == 50
    done = model.complete(TEXT[:40], temperature=1.0, seed=1)
    assert done.prompt_tokens + done.completion_tokens == 50 or done.finish_reason == "stop"
    with pytest.raises(BadInput, match=r"50 tokens.* context of 50"):
        model.complete(50 * "a")
    with pytest.raises(BadInput, match=r"51 tokens.* context of 50"):
        model.logits([1] * 51)
    assert model.logits([1] * 50).shape == (50, 264)


def test_logits_equal_transformers(tmp_path: Path) -> None:
    tiny = talking_checkpoint(tmp_path)
    model, ids = pentad.load(tmp_path), random_ids(30)
    assert_equal_logits(model.logits(ids), peer_logits(tiny.peer, ids))
    assert torch.equal(model.logits(torch.tensor(ids)), model.logits(ids))
    assert model.logits(ids).dtype == torch.float32


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m: m.complete(""), "the prompt is empty"),
        (lambda m: m.complete(["a", ""]), "the prompt is empty"),
        (lambda m: m.logits([]), "the prompt is empty"),
        (lambda m: m.logits([1, 264]), "token id 264 is outside the vocabulary of 264"),
        (lambda m: m.logits([-1, 3]), "token id -1 is outside"),
        (lambda m: m.complete("\ud800"), "surrogate"),
        (lambda m: m.score("a"), "the text has 1 tokens"),
        (lambda m: m.score(300 * "a"), "the text has 300 tokens, the context 256"),
        (lambda m: m.score(300 * "a", stride=0), "stride is 0"),
        (lambda m: m.score(300 * "a", stride=256), "stride is 256"),
        (lambda m: m.complete("a", max_tokens=0), "max_tokens is 0"),
        (lambda m: m.complete("a", max_tokens=2.5), "max_tokens is 2.5"),
        (lambda m: m.complete("a", logprobs=-1), "logprobs is -1"),
        (lambda m: m.complete("a", seed=-1), "seed is -1"),
        (lambda m: m.complete("a", seed=2**64), "seed is"),
        (lambda m: m.complete("a", temperature=-1), "temperature is -1"),
        (lambda m: m.complete("a", temperature="hot"), "temperature"),
        (lambda m: m.chat([{"role": "user"}]), ""),
        (lambda m: m.chat("a", top_p=2), "top_p is 2"),
    ],
)
def test_bad_input(model: LanguageModel, use: Any, message: str) -> None:
    with pytest.raises(BadInput) as raised:
        use(model)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert pages_of_requests(model) == 0
    assert model.open_requests == 0
    assert model.complete("a", max_tokens=2, temperature=0).completion_tokens <= 2


def test_options_of_many_prompts_are_checked_before_any_runs(model: LanguageModel) -> None:
    with pytest.raises(BadInput, match="temperature"):
        model.complete(["a", "b"], temperature=-1)
    assert model.open_requests == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cache_dtype(folder: Path, dtype: str) -> None:
    model = pentad.load(folder, cache_dtype=dtype)
    text = pentad.load(folder).complete(TEXT, temperature=0, max_tokens=4).text
    assert model.complete(TEXT, temperature=0, max_tokens=4).text[:1] == text[:1]
    assert model.step.cache.keys[0].dtype == getattr(torch, dtype)


@pytest.mark.parametrize("stop", [5, [5], b"a", ["a", None]])
def test_a_stop_that_is_not_a_string_is_refused(model: LanguageModel, stop: Any) -> None:
    with pytest.raises(BadInput, match="stop is"):
        model.complete(TEXT, stop=stop)
    assert model.complete(TEXT, temperature=0, max_tokens=2).completion_tokens == 2


def test_an_unreferenced_stream_is_cancelled(model: LanguageModel) -> None:
    stream = model.stream(TEXT, max_tokens=100, temperature=0)
    next(stream)
    del stream
    gc.collect()
    assert model.open_requests == 1
    model.complete("a", max_tokens=8, temperature=0)
    assert model.open_requests == 0
    assert pages_of_requests(model) == 0


@pytest.mark.parametrize("ids", [[1.5], [True], [[1, 2]], ["1"], torch.tensor([[1, 2]]), torch.tensor([1.5])], ids=str)
def test_ids_that_are_not_whole_numbers_are_refused(model: LanguageModel, ids: Any) -> None:
    with pytest.raises(BadInput, match="whole numbers"):
        model.logits(ids)


@pytest.mark.parametrize("text", [None, 5, b"abc", ["a", None]])
def test_a_prompt_that_is_not_a_string_is_refused(model: LanguageModel, text: Any) -> None:
    with pytest.raises(BadInput, match="a string"):
        model.complete(text)


def test_ids_outside_the_embedding_are_refused(model: LanguageModel) -> None:
    model.network.config = replace(model.network.config, vocab_size=50)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="outside the vocabulary of 50"):
        model.score(TEXT)


def test_a_perplexity_that_overflows_is_an_error(model: LanguageModel) -> None:
    model.network.head.weight = nn.Parameter(model.network.head.weight * 1e6, requires_grad=False)
    with pytest.raises(PentadError, match="perplexity"):
        model.score(TEXT)


def test_the_smallest_temperature_is_greedy(model: LanguageModel) -> None:
    greedy = model.complete(TEXT, temperature=0, max_tokens=8)
    assert model.complete(TEXT, temperature=5e-324, max_tokens=8).token_ids == greedy.token_ids


def test_a_broken_tokenizer_does_not_prevent_logits(tmp_path: Path) -> None:
    folder = talking_checkpoint(tmp_path).folder
    for broken in ("{", '{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}'):
        (folder / "tokenizer.json").write_text(broken)
        model = pentad.load(folder)
        assert model.logits([1, 2]).shape[0] == 2
        with pytest.raises(BadInput, match="tokenizer"):
            model.complete("a")


def test_a_stop_string_at_max_tokens_gives_stop(model: LanguageModel) -> None:
    whole = model.complete(TEXT, temperature=0, max_tokens=6).text
    stopped = model.complete(TEXT, temperature=0, max_tokens=6, stop=whole[-1:])
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(whole[-1:])], "stop")


def test_an_interrupted_score_frees_its_pages(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.network.head, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.score(TEXT)
    assert pages_of_requests(model) == 0


def test_an_unknown_option_names_the_known_ones(model: LanguageModel) -> None:
    with pytest.raises(BadInput, match=r"option 'max_token'.*max_tokens"):
        model.complete(TEXT, max_token=5)  # type: ignore[call-arg]


def test_a_text_far_beyond_the_context_is_not_tokenized(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "ab" * 10_000_000
    monkeypatch.setattr(model.tokenizer.backend, "encode", None)
    for call in (model.complete, model.chat, model.score):
        with pytest.raises(BadInput, match="20,000,000 characters"):
            call(text)


def test_prompts_that_memory_cannot_hold_are_refused_with_the_numbers(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pentad.generate.runner.available_memory", lambda device: 1000)
    with pytest.raises(BadInput, match=r"GB of KV cache.* 0\.0 GB"):
        model.complete(["a b c", "d e f"])


def test_requests_wait_while_the_cache_has_no_room(model: LanguageModel) -> None:
    expected = model.complete("b", max_tokens=4, temperature=0).token_ids
    model.limit_cache(model.step.cache.bytes_for(1))
    first, second = (model.stream(text, max_tokens=4, temperature=0) for text in "ab")
    list(first)
    assert second.completion.completion_tokens == 0
    list(second)
    assert second.completion.token_ids == expected
    model.limit_cache(model.step.cache.bytes_for(1) - 1)
    with pytest.raises(BadInput, match="KV cache"):
        model.complete("a")
    model.limit_cache(None)
    assert model.complete("b", max_tokens=4, temperature=0).token_ids == expected


def test_a_stream_begins_with_token_ids(model: LanguageModel) -> None:
    expected = model.complete(TEXT, max_tokens=4, temperature=0)
    stream = model.stream(list(TEXT.encode()), max_tokens=4, temperature=0)
    assert "".join(stream) == expected.text
    assert stream.completion.prompt_token_ids == expected.prompt_token_ids
    with pytest.raises(BadInput, match="99999"):
        model.stream([1, 99999])


def test_reprs_say_what_matters(model: LanguageModel) -> None:
    with model.stream("a b c", max_tokens=3) as stream:
        next(stream)
        assert repr(stream).endswith("tokens, running>")
    assert f"{model.tokenizer.vocab_size} ids" in repr(model.tokenizer)
