"""Constrained output: every reply is in its grammar, with any options and tokenizer, and bad grammars are refused."""

import contextlib
import json
import re
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jsonschema
import pytest
from torch import nn

import pentad
from pentad import Constraint
from pentad.errors import BadInput
from pentad.generate import LanguageModel
from pentad.generate.constraint import LIMITS, Compiler
from pentad.generate.engine import Engine
from pentad.text import Tokenizer
from pentad.text.backends import SentencePieceBackend
from tests.helpers.engines import ENDS, GREEDY, Counting, compiler, finish, request, spelled
from tests.helpers.tiny import logits_of, random_ids, talking_checkpoint
from tests.helpers.tiny_switch import reading_checkpoint
from tests.helpers.vocabularies import sentencepiece_model

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SAMPLINGS = [
    {"temperature": 0},
    {"temperature": 5.0, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "min_p": 0.2, "repetition_penalty": 1.5, "presence_penalty": 2.0},
]
COMPILER = compiler()
DEEP: dict[str, Any] = {}
for _ in range(300):
    DEEP = {"items": DEEP}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("talking")
    talking_checkpoint(folder, max_position_embeddings=2048)
    loaded = pentad.load(folder)
    assert isinstance(loaded, LanguageModel)
    return loaded


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("seed", [1, 2])
def test_every_reply_validates(model: LanguageModel, sampling: dict[str, Any], seed: int) -> None:
    constraint = Constraint.json_schema(PERSON)
    replies = [model.chat("hi", constraint=constraint, seed=seed, max_tokens=800, **sampling)]
    replies += model.complete(["a", "b"], constraint=constraint, seed=seed, max_tokens=800, **sampling)
    for reply in replies:
        assert reply.finish_reason == "stop"
        jsonschema.validate(json.loads(reply.text), PERSON)


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        (Constraint.regex(r"[a-f]{3}/[0-9]{2}"), r"[a-f]{3}/[0-9]{2}"),
        (Constraint.regex("^(x|y)z$"), "(x|y)z"),
        (Constraint.regex(r"a\$"), r"a\$"),
        (Constraint.regex("a\nb"), "a\nb"),
        (Constraint.choice(["yes", "no", 'a "quote"\n/ü']), 'yes|no|a "quote"\n/ü'),
        (Constraint.choice(["a", "ab"]), "ab?"),
        (Constraint.lark('start: "<" word ">"\nword: /[a-z]{2}/'), "<[a-z]{2}>"),
    ],
)
def test_a_text_matches_its_regex_choice_or_grammar(model: LanguageModel, constraint: Constraint, pattern: str) -> None:
    for seed in range(4):
        reply = model.complete("x", constraint=constraint, seed=seed, temperature=3.0, max_tokens=100)
        assert re.fullmatch(pattern, reply.text), reply.text
        assert reply.finish_reason == "stop"


def test_any_json_object(model: LanguageModel) -> None:
    reply = model.complete("x", constraint=Constraint.json_object(), seed=1, temperature=1.0, max_tokens=2000)
    assert reply.finish_reason == "length" or isinstance(json.loads(reply.text), dict)
    assert reply.text.startswith("{")


def test_a_text_that_max_tokens_cuts_says_so(model: LanguageModel) -> None:
    constraint = Constraint.regex("[ab]{10}")
    cut = model.complete("x", constraint=constraint, max_tokens=9)
    assert (cut.finish_reason, len(cut.text)) == ("length", 9)
    assert model.complete("x", constraint=constraint, max_tokens=10).finish_reason == "stop"


def test_a_stop_string_ends_a_constrained_text(model: LanguageModel) -> None:
    reply = model.complete("x", constraint=Constraint.choice(["one two"]), stop=" ", max_tokens=20)
    assert (reply.text, reply.finish_reason) == ("one", "stop")


def test_constrained_texts_are_the_same_in_a_batch(model: LanguageModel) -> None:
    options: dict[str, Any] = {"constraint": Constraint.json_schema(PERSON), "seed": 3, "temperature": 1.0}
    alone = [model.complete(text, max_tokens=300, **options).text for text in ("a", "b", "c")]
    assert [one.text for one in model.complete(["a", "b", "c"], max_tokens=300, **options)] == alone


def test_only_the_constrained_row_is_masked_and_logprobs_are_the_models(network: nn.Module, step: Counting) -> None:
    free = request(random_ids(9), logprobs=2)
    bound = request(random_ids(9), matcher=COMPILER.matcher(Constraint.regex("[xyz]{5}"), opens=False), logprobs=2)
    alone = request(random_ids(9))
    finish(Engine(step), free, bound)
    finish(Engine(step), alone)
    assert free.generated == alone.generated
    assert re.fullmatch("[xyz]{5}", spelled(bound.generated))
    assert bound.finish_reason == "stop"
    expected_TV = logits_of(network, random_ids(9) + bound.generated).log_softmax(-1)[8:-1]
    for report, token, row_V in zip(bound.token_logprobs, bound.generated, expected_TV, strict=True):
        assert report.logprob == pytest.approx(float(row_V[token]), abs=1e-4)
        assert [i for i, _ in report.top] == row_V.topk(2).indices.tolist()


def test_end_tokens_are_allowed_only_where_the_grammar_may_stop() -> None:
    matcher = COMPILER.matcher(Constraint.regex("ab*"), opens=False)
    a, b = ord("a") - 32, ord("b") - 32
    assert matcher.mask().nonzero()[:, 0].tolist() == [a]
    matcher.accept(a)
    assert matcher.mask().nonzero()[:, 0].tolist() == [*ENDS, b]
    assert not matcher.complete


def test_a_token_that_is_not_allowed_is_refused() -> None:
    with pytest.raises(BadInput):
        COMPILER.matcher(Constraint.choice(["abc"]), opens=False).accept(0)


def test_a_state_beyond_the_limits_ends_its_request_alone_with_an_error(
    step: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LIMITS, "max_lexer_states", 20)
    matcher = COMPILER.matcher(Constraint.regex("(.*a.{200})|(.*b.{100})"), opens=False)
    one, other = (
        request(random_ids(9), 40, sampling=GREEDY.replace(logit_bias={65: 100}), matcher=matcher),
        request([5], 40),
    )
    finish(Engine(step), one, other)
    assert one.finish_reason == "error"
    assert isinstance(one.error, BadInput)
    assert other.finish_reason == "length"


BOMBS = {
    "nested repetition": Constraint.regex("((a{1,1000}){1,1000}){1,1000}"),
    "huge repetition": Constraint.regex("(xy){1000000000}"),
    "exponential automaton": Constraint.lark("start: A\nA: /(.*a.{15})/ & /(.*b.{17})/ & ~/(.*c.{19})/"),
    "optional parts": Constraint.regex("(a?){3000}a{3000}"),
    "deep parentheses": Constraint.regex("(" * 30_000 + ")" * 30_000),
    "deep rules": Constraint.lark("start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(4000)) + 'a4000: "x"'),
    "deep terminals": Constraint.lark("start: A0\n" + "".join(f"A{i}: A{i + 1}\n" for i in range(4000)) + 'A4000: "x"'),
    "ambiguous": Constraint.lark('start: s\ns: s s | "a" | '),
    "many properties": Constraint.json_schema({"properties": {f"c{i}": {"type": "integer"} for i in range(2000)}}),
    "combinations": Constraint.json_schema(
        {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}{j}": {"maxLength": i + j}}} for j in range(3)]} for i in range(12)
            ]
        }
    ),
    "doubling references": Constraint.json_schema(
        {
            "$ref": "#/$defs/0",
            "$defs": {str(i): {"allOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(40)} | {"40": {}},
        }
    ),
    "chained references": Constraint.json_schema(
        {
            "$ref": "#/$defs/0",
            "$defs": {str(i): {"allOf": [{"$ref": f"#/$defs/{i + 1}"}]} for i in range(1200)} | {"1200": {}},
        }
    ),
    "circular references": Constraint.json_schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
    "many items": Constraint.json_schema({"type": "array", "minItems": 500_000, "maxItems": 1_000_000}),
    "multiples": Constraint.json_schema({"type": "integer", "multipleOf": 19_997}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_grammar_takes_bounded_time_to_compile_and_in_each_step(name: str) -> None:
    begun = time.process_time()
    with contextlib.suppress(BadInput):
        matcher = COMPILER.matcher(BOMBS[name], opens=False)
        for _ in range(20):
            allowed = matcher.mask().nonzero()[:, 0].tolist()
            if allowed[-1] in ENDS:
                break
            matcher.accept(allowed[-1])
    assert time.process_time() - begun < 20  # without limits: minutes, or a stack overflow


@pytest.mark.parametrize(
    ("constraint", "facts"),
    [
        (Constraint.regex("(a"), "regex"),
        (Constraint.regex("(?=a)b"), "regex"),
        (Constraint.lark("begin: /a/"), "start"),
        (Constraint.lark("start: missing"), "missing"),
        (Constraint.lark('start: %json {"uniqueItems": true}'), "uniqueItems"),
        (Constraint.lark('start: %json {"uniqueItems": true, "x-guidance": {"lenient": true}}'), "uniqueItems"),
        (Constraint.lark('{"grammars": [{"json_schema": {}}]}'), "can't be used"),
        (Constraint.json_schema({"type": "string", "format": "nonsense"}), "nonsense"),
        (Constraint.json_schema({"type": "colour"}), "colour"),
        (Constraint.json_schema({"$ref": "http://example.com/other"}), "example.com"),
        (Constraint.json_schema({"oneOf": [{"type": "string"}, {"maxLength": 3}]}), "oneOf"),
        (Constraint.json_schema({"type": "integer", "minimum": 3, "maximum": 2}), "minimum"),
        (Constraint.json_schema({"anyOf": []}), "anyOf"),
        (Constraint.json_schema(DEEP), "recursion"),
        (Constraint.regex("é"), "can't be followed"),  # the vocabulary has no such letter
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused_with_the_reason(constraint: Constraint, facts: str) -> None:
    with pytest.raises(BadInput) as raised:
        COMPILER.matcher(constraint, opens=False)
    message = str(raised.value)
    assert facts in message
    assert "\n" not in message
    assert len(message) < 400


def test_a_constraint_has_a_type(model: LanguageModel) -> None:
    with pytest.raises(BadInput, match=r"constraint is a dict.*Constraint"):
        model.complete("x", constraint={})  # type: ignore[arg-type]


def test_the_space_in_front_of_a_reply_is_not_a_part_of_it() -> None:
    """A SentencePiece vocabulary has most words with a space, which is dropped at the beginning of a chat's reply."""
    backend = SentencePieceBackend(sentencepiece_model())
    tokenizer = Tokenizer(backend, bos_id=1, eos_ids=[2], adds_bos=True, special_tokens={}, templates={})
    compiler = Compiler(tokenizer, backend.vocab_size)
    spaced = [token for token in range(backend.vocab_size) if re.fullmatch(b" [a-z]+", backend.token_bytes(token))]
    token = max(spaced, key=lambda token: len(backend.token_bytes(token)))
    word = backend.first_bytes(token).decode()
    constraint = Constraint.regex(f"{word}( [a-z]+)*")

    chat = compiler.matcher(constraint, opens=True)
    assert chat.mask()[token]
    assert {tokenizer.decode([one]) for one in chat.mask().nonzero()[:, 0].tolist()} <= {
        word[:n] for n in range(1, len(word) + 1)
    }
    chat.accept(token)
    assert {backend.token_bytes(one)[:1] for one in chat.mask().nonzero()[:, 0].tolist()} == {b" ", b"<"}  # or the end

    continuation = compiler.matcher(constraint, opens=False)
    assert not continuation.mask()[spaced].any()
    assert continuation.mask().any()


def test_an_encoder_decoder_is_constrained(tmp_path: Path) -> None:
    reading = pentad.load(reading_checkpoint(tmp_path).folder)
    for seed in range(3):
        options: Any = {"constraint": Constraint.choice(["walks", "in the park"]), "seed": seed, "max_tokens": 30}
        reply = reading.complete("A dog walks.", temperature=1.0, **options)
        assert (reply.text, reply.finish_reason) in [("walks", "stop"), ("in the park", "stop")]


def test_an_end_token_is_not_needed() -> None:
    class Endless:
        control = MappingProxyType[str, int]({})
        eos_ids = ()

        def token_bytes(self, token: int) -> bytes:
            return bytes([token])

        first_bytes = token_bytes

    matcher = Compiler(Endless(), 128).matcher(Constraint.regex("ab?"), opens=False)  # type: ignore[arg-type]
    assert len(matcher.mask()) == 128
    matcher.accept(ord("a"))
    assert matcher.mask().nonzero()[:, 0].tolist() == [ord("b")]
