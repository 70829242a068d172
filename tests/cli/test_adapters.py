"""``--adapter`` and ``pentad merge``."""

from pathlib import Path

import pytest

from tests.helpers.peft_adapters import adapted
from tests.helpers.tiny import talking_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    talking_checkpoint(folder)
    adapted(folder)
    return folder


def test_the_merged_model_answers_as_the_base_with_the_adapter(pentad, base: Path, tmp_path: Path) -> None:
    merged = pentad("merge", base, base / "adapter", tmp_path / "merged", "--json")
    assert merged.code == 0
    assert (merged.json["path"], merged.json["format"]) == (str(tmp_path / "merged"), "hf")
    for command in (["chat", "hi", "--max-tokens", 8, "--temperature", 0], ["complete", "hi", "--max-tokens", 8]):
        if command[0] == "complete":
            command += ["--seed", 1]
        plain = pentad(*command, "--model", base)
        with_adapter = pentad(*command, "--model", base, "--adapter", base / "adapter")
        assert with_adapter.out == pentad(*command, "--model", tmp_path / "merged").out
        assert with_adapter.out != plain.out
        assert with_adapter.err.count("\n") == 1
        assert f"{base / 'adapter'} merged into its weights" in with_adapter.err
    (tmp_path / "text").write_text("some text")
    scores = [
        pentad("score", tmp_path / "text", "--json", "--model", *arguments).json["log_likelihood"]
        for arguments in ([base], [base, "--adapter", base / "adapter"], [tmp_path / "merged"])
    ]
    assert scores[1] == pytest.approx(scores[2], abs=1e-4)
    assert abs(scores[0] - scores[1]) > 0.1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["BASE", "BASE/adapter", "BASE"], "is the source itself"),
        (["BASE", "BASE/adapter", "BASE/adapter"], "exists"),
        (["BASE", "nowhere", "OUT"], "nowhere: no such folder"),
        (["BASE", "BASE", "OUT"], "adapter has one"),
        (["BASE/adapter", "BASE/adapter", "OUT"], "an adapter, not a model"),
        (["BASE", "BASE/adapter", "OUT.gguf"], "doesn't end in .gguf"),
    ],
)
def test_bad_arguments(pentad, base: Path, tmp_path: Path, arguments: list[str], named: str) -> None:
    paths = [text.replace("BASE", str(base)).replace("OUT", str(tmp_path / "out")) for text in arguments]
    done = pentad("merge", *paths)
    assert done.code == 2
    assert named in done.error
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_absent(pentad, base: Path) -> None:
    done = pentad("chat", "hi", "--model", base, "--adapter", "nowhere")
    assert done.code == 2
    assert "nowhere: no such folder" in done.error
