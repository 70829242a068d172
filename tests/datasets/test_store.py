"""The store of tokenized examples."""

import json
import threading
from pathlib import Path

import pytest

from pentad.datasets import store
from pentad.datasets.examples import DOCUMENTS, Encoder
from pentad.text import Tokenizer
from pentad.text.backends import TokenizersBackend
from tests.helpers.tiny import END, byte_pipeline


def test_of_two_that_prepare_the_same_data_one_tokenizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENTAD_CACHE", str(tmp_path / "cache"))
    backend = TokenizersBackend(byte_pipeline(END))
    tokenizer = Tokenizer(backend, bos_id=None, eos_ids=[256], adds_bos=False, special_tokens={}, templates={})
    data = tmp_path / "x.jsonl"
    data.write_text("".join(json.dumps({"text": "ab" * n}) + "\n" for n in range(1, 2000)))
    written, write = [], store._write

    def counted(*arguments: object) -> None:
        written.append(threading.get_ident())
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "_write", counted)
    found: list[store.Examples] = []

    def prepare() -> None:
        found.append(store.prepare(data, Encoder(tokenizer, DOCUMENTS, 4096), "a tokenizer"))

    threads = [threading.Thread(target=prepare) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert [len(examples) for examples in found] == [1999] * 3
    [(ids, targets)] = found[0][1500]
    assert bytes(ids[:-1].tolist()) == b"ab" * 1501
    assert ids[-1] == 256
    assert targets.all()
    assert found[0].location(1500) == f"{data}:1501"
    assert len(list((tmp_path / "cache/examples").glob("[!.]*"))) == 1
