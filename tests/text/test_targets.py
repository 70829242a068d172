"""Targets of conversations, found by marks in the rendered template."""

import pytest

from pentad.errors import BadInput
from pentad.text import Tokenizer
from pentad.text.backends import TokenizersBackend
from pentad.text.targets import encode_completion, encode_conversation, encode_document
from tests.helpers.tiny import byte_pipeline

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' </s>' }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + c + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = [
    {"role": "user", "content": "Hi é"},
    {"role": "assistant", "content": " Yes, <|im_end|> ü\n"},
    {"role": "user", "content": "No"},
    {"role": "assistant", "content": "Bye"},
]


def tokenizer(template: str) -> Tokenizer:
    """One token a byte, and control tokens."""
    backend = TokenizersBackend(byte_pipeline("<|im_start|>", "<|im_end|>", "</s>"))
    ends = [backend.control.ids[s] for s in ("<|im_end|>", "</s>")]
    return Tokenizer(
        backend, bos_id=None, eos_ids=ends, adds_bos=False, special_tokens={}, templates={"default": template}
    )


def learned(tok: Tokenizer, encoded: object) -> list[str]:
    """The runs of targets, as text."""
    runs: list[list[int]] = []
    before = False
    for token, target in zip(encoded.ids, encoded.targets, strict=True):  # type: ignore[attr-defined]
        if target:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = target
    return [tok.decode(run, special=True) for run in runs]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, [" Yes, <|im_end|> ü\n<|im_end|>", "Bye<|im_end|>"]),
        (LLAMA, ["Yes, <|im_end|> ü </s>", "Bye </s>"]),
        (THINKING, [" Yes, <|im_end|> ü\n<|im_end|>", "Bye<|im_end|>"]),
    ],
)
def test_replies_and_their_ends_are_targets(template: str, expected: list[str]) -> None:
    tok = tokenizer(template)
    encoded = encode_conversation(tok, TURNS)
    assert encoded.ids == tok.chat(TURNS, add_generation_prompt=False)
    found = learned(tok, encoded)
    assert [text.removeprefix("<think>\n\n</think>\n\n") for text in found] == expected
    assert encoded.ends == 2


def test_messages_before_first_are_no_targets() -> None:
    tok = tokenizer(CHATML)
    assert learned(tok, encode_conversation(tok, TURNS, first=2)) == ["Bye<|im_end|>"]


def test_a_reply_that_the_template_drops_is_refused() -> None:
    tok = tokenizer("{{ messages[-1].content }}")
    with pytest.raises(BadInput, match="leaves out a reply"):
        encode_conversation(tok, TURNS)


def test_a_completion_and_its_end_are_targets() -> None:
    tok = tokenizer(CHATML)
    assert learned(tok, encode_completion(tok, "é =", " ü")) == [" ü<|im_end|>"]


def test_every_token_of_a_document_is_a_target() -> None:
    tok = tokenizer(CHATML)
    assert learned(tok, encode_document(tok, "ab")) == ["ab<|im_end|>"]
