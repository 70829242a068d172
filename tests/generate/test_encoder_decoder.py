"""Encoder-decoders: cached steps, batched requests, the runner, and errors."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import pentad
from pentad.cli import application
from pentad.errors import BadInput
from pentad.generate import EncoderDecoderModel, encoder_decoder_step
from pentad.generate.encoder_decoder_step import EncoderDecoderStep
from pentad.generate.engine import Engine
from pentad.generate.requests import Generation
from pentad.generate.sampling import Sampling
from pentad.nn.encoder_decoder import EncoderDecoder
from tests.helpers.plain import read_pages
from tests.helpers.tiny import assert_equal_logits, edit_json, network_of, random_ids
from tests.helpers.tiny_switch import reading_checkpoint, run, stepped, switch_checkpoint

GREEDY = {"temperature": 0.0, "max_tokens": 20}
PROMPT = "The <extra_id_0> walks in <extra_id_1> park"
SOURCES = [random_ids(20), random_ids(61, seed=1), random_ids(3, seed=2), random_ids(20, seed=3)]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> EncoderDecoder:
    folder = tmp_path_factory.mktemp("switch")
    switch_checkpoint(folder)
    made = network_of(folder)
    assert isinstance(made, EncoderDecoder)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reading_checkpoint(tmp_path_factory.mktemp("reading")).folder


@pytest.fixture(scope="module")
def model(folder: Path) -> EncoderDecoderModel:
    loaded = pentad.load(folder)
    assert isinstance(loaded, EncoderDecoderModel)
    return loaded


def request(source: Sequence[int], max_tokens: int = 12, seed: int = 0, **options: Any) -> Generation:
    generator = torch.Generator().manual_seed(seed)
    sampling = Sampling(**{"temperature": 0.0, **options})
    return Generation([0], sampling=sampling, generator=generator, max_tokens=max_tokens, source=source)


def texts(step: EncoderDecoderStep, *requests: Generation) -> list[list[int]]:
    engine = Engine(step)
    for one in requests:
        engine.submit(one)
    while engine.requests:
        engine.step()
    return [one.generated for one in requests]


def pages_in_use(step: EncoderDecoderStep) -> list[int]:
    """The numbers of pages that the decoder's cache and the sources' cache use."""
    return [cache.pages_in_use for cache in (step.cache, step.cache.sources)]


# --- the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 3, 16, 256])
@pytest.mark.parametrize("size", [1, 7, 50])
def test_cached_chunks_equal_one_uncached_run(network: EncoderDecoder, size: int, page_size: int) -> None:
    text = [0, *random_ids(49, seed=9)]
    expected = run(network, (SOURCES[1], text))[1]
    assert_equal_logits(stepped(network, SOURCES[1], text, size, page_size=page_size), expected)


@torch.inference_mode()
def test_a_batch_equals_single_runs(network: EncoderDecoder) -> None:
    pairs = [(source, [0, *random_ids(5 + 9 * i, seed=i)]) for i, source in enumerate(SOURCES)]
    singly = [run(network, pair)[1] for pair in pairs]
    assert_equal_logits(run(network, *pairs)[1], torch.cat(singly))
    step = EncoderDecoderStep(network, page_size=4)
    work = [(step.cache.open_with(source), text) for source, text in pairs]
    rows = range(sum(len(text) for _, text in pairs))
    assert_equal_logits(step(work, rows), torch.cat(singly))


def test_the_same_input_gives_the_same_bits(network: EncoderDecoder) -> None:
    one, other = (stepped(network, SOURCES[1], [0, *SOURCES[0]], page_size=size) for size in (3, 256))
    assert torch.equal(one, other)


def test_a_bfloat16_cache_is_close_to_float32(network: EncoderDecoder) -> None:
    exact = stepped(network, SOURCES[1], [0, *SOURCES[0]])
    rounded = stepped(network, SOURCES[1], [0, *SOURCES[0]], cache_dtype=torch.bfloat16)
    assert 0 < float((rounded - exact).abs().mean()) < 0.05 * float(exact.abs().mean())


def test_sources_are_encoded_once(network: EncoderDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    encode = EncoderDecoder.encode

    def counting(self: EncoderDecoder, ids: Any, batch: Any) -> Any:
        encoded.append(len(batch.layout))
        return encode(self, ids, batch)

    monkeypatch.setattr(EncoderDecoder, "encode", counting)
    step = EncoderDecoderStep(network, page_size=8)
    sequences = [step.cache.open_with(source) for source in SOURCES]
    step([(sequence, [0]) for sequence in sequences], range(4))
    assert encoded == [4]  # in one batch

    def read() -> list[Tensor]:
        pages = step.cache.sources.batch([(sequence.source, 0) for sequence in sequences]).kv
        return [read_pages(pool, pages, i).clone() for pool in (*pages.keys, *pages.values) for i in range(4)]

    written = read()
    for token in (5, 6, 7):
        step([(sequence, [token]) for sequence in sequences], range(4))
    assert encoded == [4]
    assert len(written) == 3 * 2 * 4
    assert all(map(torch.equal, written, read()))
    for sequence in sequences:
        step.cache.close(sequence)
    assert pages_in_use(step) == [0, 0]


def test_many_sources_are_encoded_in_several_batches(network: EncoderDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[tuple[int, ...]] = []
    encode = EncoderDecoder.encode

    def recording(self: EncoderDecoder, ids: Any, batch: Any) -> Any:
        parts.append(batch.layout.lengths)
        return encode(self, ids, batch)

    monkeypatch.setattr(EncoderDecoder, "encode", recording)
    expected = texts(EncoderDecoderStep(network), *map(request, SOURCES))
    assert parts.pop() == (20, 61, 3, 20)
    monkeypatch.setattr(encoder_decoder_step, "MAX_ENCODED_TOKENS", 25)
    assert texts(EncoderDecoderStep(network), *map(request, SOURCES)) == expected
    assert parts == [(20,), (61,), (3, 20)]


# --- the engine -----------------------------------------------------------------------------------


def test_batched_requests_give_the_same_tokens_as_single_ones(network: EncoderDecoder) -> None:
    settings: list[dict[str, Any]] = [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 5}, {"max_tokens": 3}]
    made = [lambda i=i: request(SOURCES[i], seed=i, **settings[i]) for i in range(4)]
    single = [texts(EncoderDecoderStep(network, page_size=4), make())[0] for make in made]
    batched = texts(EncoderDecoderStep(network, page_size=4), *(make() for make in made))
    assert batched == single
    assert [len(text) for text in single] == [12, 12, 12, 3]
    assert len({tuple(text) for text in single}) == 4


def test_a_request_for_a_kept_source_does_not_encode_it_again(
    network: EncoderDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = EncoderDecoder.encode
    monkeypatch.setattr(EncoderDecoder, "encode", lambda self, *args: encoded.append(1) or encode(self, *args))
    engine = Engine(EncoderDecoderStep(network, page_size=4))
    replies = []
    for source in (SOURCES[0], SOURCES[0], SOURCES[1], SOURCES[0]):
        engine.submit(one := request(source))
        while engine.requests:
            engine.step()
        replies.append(one.generated)
    assert replies[0] == replies[1] == replies[3]
    assert replies[0] != replies[2]
    assert len(encoded) == 2
    engine.drop_kept()
    assert pages_in_use(engine.executor) == [0, 0]


def test_requests_for_one_source_encode_it_once(network: EncoderDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    encode = EncoderDecoder.encode
    monkeypatch.setattr(EncoderDecoder, "encode", lambda self, *args: encoded.append(1) or encode(self, *args))
    settings = [{"seed": seed, "temperature": 1.0} for seed in range(4)]
    single = [texts(EncoderDecoderStep(network, page_size=4), request(SOURCES[1], **one))[0] for one in settings]
    encoded.clear()
    requests = [request(SOURCES[1], **one) for one in settings]
    assert texts(EncoderDecoderStep(network, page_size=4), *requests) == single
    assert len(encoded) == 1
    assert [one.cached_tokens for one in requests] == [0, *[len(SOURCES[1])] * 3]


# --- the runner -----------------------------------------------------------------------------------


def test_greedy_tokens_equal_transformers(tmp_path: Path) -> None:
    tiny = reading_checkpoint(tmp_path)
    model = pentad.load(tmp_path)
    for text in (PROMPT, "Hello world", "a"):
        completion = model.complete(text, special=True, **GREEDY)
        ids = torch.tensor([completion.prompt_token_ids])
        theirs = tiny.peer.generate(ids, max_new_tokens=20, do_sample=False)[0, 1:].tolist()
        assert completion.token_ids == [i for i in theirs if i != 1]
        assert completion.finish_reason == ("stop" if 1 in theirs else "length")


def test_prompt_ids_and_text(model: EncoderDecoderModel) -> None:
    tokenizer = model.tokenizer
    first, second = tokenizer.control["<extra_id_0>"], tokenizer.control["<extra_id_1>"]
    completion = model.complete(PROMPT, special=True, **GREEDY)
    assert completion.prompt_token_ids == [*tokenizer.encode(PROMPT, special=True), 1]
    assert {first, second} < set(completion.prompt_token_ids)
    assert completion.prompt_tokens == len(completion.prompt_token_ids)
    assert completion.text == tokenizer.decode(completion.token_ids, special=True)
    plain = model.complete(PROMPT, **GREEDY)
    assert first not in plain.prompt_token_ids
    assert model.prompt_ids("</s>", special=True) == [1]  # a prompt that ends with </s> gets no second one


def test_the_text_contains_the_sentinels(model: EncoderDecoderModel, monkeypatch: pytest.MonkeyPatch) -> None:
    control, encode = model.tokenizer.control, model.tokenizer.encode
    wanted = [control["<extra_id_0>"], *encode("dog"), control["<extra_id_1>"], *encode("the"), 1]
    monkeypatch.setattr("pentad.generate.engine.sample", lambda *_: ([wanted.pop(0)], [0.0]))
    completion = model.complete(PROMPT, special=True)
    assert completion.text == "<extra_id_0> dog<extra_id_1> the"
    assert completion.finish_reason == "stop"


def test_several_prompts_and_a_stream(model: EncoderDecoderModel) -> None:
    prompts = [PROMPT, "Hello", "A much longer sentence, so that the sources have different lengths."]
    single = [model.complete(prompt, **GREEDY).token_ids for prompt in prompts]
    assert [each.token_ids for each in model.complete(prompts, **GREEDY)] == single
    with model.stream(PROMPT, **GREEDY) as stream:
        assert "".join(stream) == stream.completion.text
        assert stream.completion.token_ids == single[0]


def test_logits(model: EncoderDecoderModel) -> None:
    source, text = model.prompt_ids("Hello world"), [model.network.start_id, *random_ids(20)]
    logits = model.logits(source, text)
    assert logits.dtype == torch.float32
    assert logits.shape == (21, 512)
    assert_equal_logits(logits, run(model.network, (source, text))[1])
    assert torch.equal(model.logits(torch.tensor(source), torch.tensor(text)), logits)


def test_loaded_without_a_tokenizer(tmp_path: Path) -> None:
    switch_checkpoint(tmp_path)
    model = pentad.load(tmp_path)
    assert isinstance(model.logits([3, 1], [0]), Tensor)
    with pytest.raises(BadInput, match="has no tokenizer"):
        model.complete("a")


def test_the_context_bounds_source_and_text(folder: Path) -> None:
    assert pentad.load(folder).context_length == 512
    small, large = pentad.load(folder, context=8), pentad.load(folder, context=2000)
    assert small.complete("a", temperature=0.0).completion_tokens <= 7
    with pytest.raises(BadInput, match=r"prompt has \d+ tokens.* context of 8"):
        small.complete("a " * 30)
    with pytest.raises(BadInput, match=r"9 tokens.* context of 8"):
        small.logits([3], [0] * 9)
    short, full = (small.complete("a", temperature=0.0, max_tokens=n) for n in (2, 7))
    assert (small.is_full(short), small.is_full(full)) == (False, full.completion_tokens == 7)
    assert large.complete("a " * 700, max_tokens=2).prompt_tokens > 600


def test_the_context_length_is_n_positions(tmp_path: Path) -> None:
    reading_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", n_positions=77)
    assert pentad.load(tmp_path).context_length == 77


# --- errors ---------------------------------------------------------------------------------------


def test_an_encoder_decoder_has_no_chat_and_no_score(model: EncoderDecoderModel, folder: Path) -> None:
    assert not hasattr(model, "chat")
    assert not hasattr(model, "score")
    with pytest.raises(BadInput, match=r"context is 1; expected 2 to"):
        pentad.load(folder, context=1)


@pytest.mark.parametrize(
    ("ids", "decoder_ids", "message"),
    [
        ([], [0], "the prompt is empty"),
        ([3], [], "the prompt is empty"),
        ([3], [512], r"token id 512\b.* 512"),
        ([-1], [0], "token id -1"),
        ([3] * 513, [0], r"513 tokens.* 512"),
    ],
)
def test_invalid_ids_are_refused(
    model: EncoderDecoderModel, ids: list[int], decoder_ids: list[int], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        model.logits(ids, decoder_ids)


def test_an_empty_prompt_is_refused(model: EncoderDecoderModel) -> None:
    with pytest.raises(BadInput, match="the prompt is empty"):
        model.complete("")


# --- the command line -----------------------------------------------------------------------------


def test_complete_on_the_command_line(folder: Path, model: EncoderDecoderModel) -> None:
    options = ["--model", str(folder), "--special", "--temperature", "0", "--max-tokens", "5", "--json"]
    result = CliRunner().invoke(application(), ["complete", PROMPT, *options])
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert answer["token_ids"] == model.complete(PROMPT, special=True, temperature=0.0, max_tokens=5).token_ids
    assert answer["prompt_token_ids"] == model.prompt_ids(PROMPT, special=True)


@pytest.mark.parametrize(
    ("command", "message"),
    [(["chat", "hi"], "encoder-decoder"), (["score", "-"], "encoder-decoder"), (["bench"], "encoder-decoder")],
)
def test_commands_for_other_models_are_refused(folder: Path, command: list[str], message: str) -> None:
    result = CliRunner().invoke(application(), [*command, "--model", str(folder)], input="some text")
    assert isinstance(result.exception, BadInput)
    assert message in str(result.exception)
