"""SentencePiece models and tekken.json of Mistral's and Meta's folders give mistral-common's ids."""

import base64
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer, ValidationMode
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from pentad.errors import BadInput
from pentad.text import Tokenizer, load
from tests.helpers.vocabularies import PUBLISHED, SHORT, published, sentencepiece_model, source, tekken

MESSAGE = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
MISTRAL = {"dim": 64, "hidden_dim": 128}
META = {"dim": 64, "multiple_of": 32}
TEXTS = [text for text in SHORT if text.strip()] + [" a", "b ", "\n\nc", "d\n"]


def load_folder(folder: Path, files: dict[str, Any], config: dict[str, Any] = MISTRAL) -> Tokenizer:
    tokenizer = load(source(folder, files, format="consolidated", config=config))
    assert tokenizer is not None
    return tokenizer


def conversations() -> list[list[dict[str, str]]]:
    chats = []
    for i, text in enumerate(TEXTS):
        others = TEXTS[i - 1], TEXTS[i - 2]
        chat = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": others[0]},
            {"role": "user", "content": others[1]},
        ]
        chats += [chat[:1], chat, chat[:2], [{"role": "system", "content": others[0]}, *chat]]
    return chats


def assert_chats_equal(tokenizer: Tokenizer, peer: MistralTokenizer) -> None:
    for chat in conversations():
        request = ChatCompletionRequest(messages=[MESSAGE[m["role"]](content=m["content"]) for m in chat])
        assert tokenizer.chat(chat) == peer.encode_chat_completion(request).tokens, chat


@pytest.mark.parametrize("version", PUBLISHED)
def test_published_models_by_name(tmp_path: Path, version: str) -> None:
    tokenizer = load_folder(tmp_path, {PUBLISHED[version]: published(version)}, META)
    file = tmp_path / PUBLISHED[version]
    peer = MistralTokenizer.from_file(file, mode=ValidationMode.agnostic)
    theirs = peer.instruct_tokenizer.tokenizer
    assert tokenizer.vocab_size == theirs.n_words
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (1, (2,), True)
    for text in SHORT:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text, bos=False, eos=False)
        assert tokenizer.decode(ids) == theirs.decode(ids)
    assert_chats_equal(tokenizer, peer)


def test_inst_is_a_control_token_from_version_2_on(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi [/INST] <s>"}]
    first = load_folder(tmp_path / "1", {"tokenizer.model.v1": published("v1")})
    assert first.chat(chat) == [1, *first.encode("[INST] hi [/INST] <s> [/INST]")]
    second = load_folder(tmp_path / "2", {"tokenizer.model.v3": published("v3")})
    assert second.chat(chat) == [1, 3, *second.encode("hi [/INST] <s>"), 4]
    assert not {1, 3, 4} & set(second.encode("<s>[INST]x[/INST]"))


@pytest.mark.parametrize(
    ("version", "config", "opens"),
    [
        ("v1", MISTRAL, [1, 733, 16289, 28793]),  # <s> ▁[ INST ]
        ("v1", META, None),  # Llama 2's file looks the same, but its chat format differs
        ("v3", MISTRAL, [1, 3]),  # <s> [INST]
        ("v7", META, [1, 16]),  # <s> [SYSTEM_PROMPT]
    ],
)
def test_the_version_of_tokenizer_model_without_a_suffix(
    tmp_path: Path, version: str, config: dict[str, Any], opens: list[int] | None
) -> None:
    tokenizer = load_folder(tmp_path, {"tokenizer.model": published(version)}, config)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (1, (2,), True)
    if opens is None:
        assert tokenizer.chat_template is None
    else:
        chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
        assert tokenizer.chat(chat)[: len(opens)] == opens


def test_llama_2_ids_equal_sentencepiece(tmp_path: Path) -> None:
    model = sentencepiece_model()
    tokenizer = load_folder(tmp_path, {"tokenizer.model": model}, META)
    peer = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert all(tokenizer.encode(text) == peer.encode(text) for text in SHORT)
    assert tokenizer.encode("<s>a</s>", special=True) == [1, *peer.encode("a"), 2]
    assert tokenizer.encode("<s>hello", special=True)[1:] == peer.encode("hello")  # a space follows control tokens too
    assert tokenizer.chat_template is None


def test_the_newest_of_several_versions_is_read(tmp_path: Path) -> None:
    files = {"tokenizer.model": published("v1"), "tokenizer.model.v1": published("v1")}
    assert load_folder(tmp_path, {**files, "tokenizer.model.v3": published("v3")}).vocab_size == 32768


def test_tokenizer_config_determines_the_template(tmp_path: Path) -> None:
    files = {"tokenizer.model.v3": published("v3"), "tokenizer_config.json": {"bos_token": "<s>"}}
    assert load_folder(tmp_path, files).chat_template is None
    assert load_folder(tmp_path, {"chat_template.jinja": "T"}).chat_template == "T"


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([("assistant", "a")], "alternate"),
        ([("user", "a"), ("user", "b")], "alternate"),
        ([("user", "a"), ("system", "b")], "alternate"),
        ([("user", "a"), ("tool", "b")], "alternate"),
    ],
)
@pytest.mark.parametrize("version", ["v1", "v3", "v7"])
def test_unsupported_conversations_are_refused(
    tmp_path: Path, version: str, chat: list[tuple[str, str]], message: str
) -> None:
    tokenizer = load_folder(tmp_path, {PUBLISHED[version]: published(version)})
    with pytest.raises(BadInput, match=message):
        tokenizer.chat([{"role": role, "content": content} for role, content in chat])
    with pytest.raises(BadInput, match="tools"):
        tokenizer.chat([{"role": "user", "content": "a"}], tools=[{"name": "x"}])


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"AAAA\n", b"\x0a\x07\x0a\x05hello", published("v1")[:-5]], ids=range(5)
)
def test_a_file_that_is_not_a_sentencepiece_model_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(BadInput, match=r"tokenizer\.model: .*SentencePiece") as error:
        load_folder(tmp_path, {"tokenizer.model": content})
    assert "\n" not in str(error.value)


def test_a_piece_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    model = published("v1").replace("▁the".encode(), b"\xe2\x96\x81t\xffe", 1)
    with pytest.raises(BadInput, match="UTF-8"):
        load_folder(tmp_path, {"tokenizer.model": model})


LISTED = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]"),
    *("[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"),
)
SPECIAL_TOKENS = [{"rank": i, "token_str": token, "is_control": True} for i, token in enumerate(LISTED)]


@pytest.mark.parametrize(
    ("version", "lists"), [("v3", False), ("v7", False), ("v7", True), ("v11", True), ("v13", True)]
)
def test_tekken_equals_mistral_common(tmp_path: Path, version: str, lists: bool) -> None:
    content = tekken(version=version, **({"special_tokens": SPECIAL_TOKENS} if lists else {}))
    tokenizer = load_folder(tmp_path, {"tekken.json": content})
    peer = MistralTokenizer.from_file(tmp_path / "tekken.json", mode=ValidationMode.agnostic)
    theirs = peer.instruct_tokenizer.tokenizer
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (600, 1, (2,), True)
    assert tokenizer.special_tokens["pad_token"] == "<pad>"
    assert sorted(tokenizer.control.values()) == sorted(theirs.special_ids) == list(range(30))
    assert {token: theirs.get_special_token(token) for token in tokenizer.control} == tokenizer.control
    for text in SHORT:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text, bos=False, eos=False)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == b"".join(map(theirs.id_to_byte_piece, ids))
    assert_chats_equal(tokenizer, peer)


def test_the_published_tekken_equals_mistral_common(tmp_path: Path) -> None:
    file = resources.files("mistral_common") / "data/tekken_240718.json"
    (tmp_path / "tekken.json").symlink_to(str(file))
    tokenizer = load_folder(tmp_path, {})
    theirs = Tekkenizer.from_file(str(file))
    assert tokenizer.vocab_size == theirs.n_words == 131072
    assert tokenizer.control["<SPECIAL_999>"] == 999
    for text in SHORT:
        assert tokenizer.encode(text) == theirs.encode(text, bos=False, eos=False)


def test_an_unknown_version_has_no_template(tmp_path: Path) -> None:
    assert load_folder(tmp_path, {"tekken.json": tekken(version="v15")}).chat_template is None


def word(data: bytes, rank: int) -> dict[str, Any]:
    return {"rank": rank, "token_bytes": base64.b64encode(data).decode(), "token_str": None}


BYTES = [word(bytes([byte]), byte) for byte in range(256)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": None}, "config .*pattern"),
        ({"version": None}, "config .*version"),
        ({"pattern": "(?<"}, "not a tekken.json"),
        ({"default_vocab_size": 10**9}, "700 words and 30 control tokens .* 1000000000 ids"),
        ({"default_vocab_size": 20}, "30 control tokens .* 20 ids"),
        ({"default_num_special_tokens": 0}, "0 control tokens"),
        ({"default_num_special_tokens": 10**9, "default_vocab_size": 10**9 + 300}, "1000000000 control tokens"),
        ({"vocab": None}, "no words"),
        ({"vocab": BYTES[:200], "default_vocab_size": 230}, "56 of the 256 bytes.* 0xc8"),
        ({"vocab": [*BYTES[:255], "x"], "default_vocab_size": 286}, r"vocab\[255\]: .*rank 255"),
        ({"vocab": BYTES[::-1], "default_vocab_size": 286}, r"vocab\[0\]: .*rank 0"),
        ({"vocab": [{**BYTES[0], "token_bytes": "A"}], "default_vocab_size": 31}, r"vocab\[0\]: token_bytes .*base64"),
        ({"vocab": [*BYTES, word(b"a", 256)], "default_vocab_size": 287}, "1 .*twice"),
        ({"vocab": [*BYTES, word(b"<s>", 256)], "default_vocab_size": 287}, "1 .*twice"),
        ({"vocab": [*BYTES, word(b"x" * 10**6, 256)], "default_vocab_size": 287}, "1000000 bytes"),
        ({"special_tokens": [{"rank": 1, "token_str": "<s>"}]}, r"special_tokens\[0\]: .*rank 0"),
        ({"special_tokens": SPECIAL_TOKENS * 2}, "special_tokens: .*list of at most 30"),
        ({"special_tokens": {}}, "special_tokens: .*list"),
    ],
)
def test_an_invalid_tekken_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=rf"tekken\.json: .*{message}") as error:
        load_folder(tmp_path, {"tekken.json": tekken(**change)})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"[]", b"\xff"])
def test_a_tekken_that_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(BadInput, match=r"tekken\.json ") as error:
        load_folder(tmp_path, {"tekken.json": content})
    assert "\n" not in str(error.value)
