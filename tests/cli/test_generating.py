"""`pentad chat`, `complete` and `score` on SmolLM2, and their errors."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pentad as package
from pentad.convert import convert
from pentad.generate.plan_step import PlanStep
from pentad.generate.step import PlainStep
from tests.helpers.programs import needs_kernels
from tests.helpers.tiny import talking_checkpoint

ROOT = Path(__file__).parents[2]
GREEDY = ["--temperature", "0", "--max-tokens", "8"]
FIELDS = {
    "model",
    "text",
    "token_ids",
    "prompt_token_ids",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "seconds",
}


def test_chat_equals_the_api(pentad, smollm2: Path) -> None:
    question = "What is the capital of France?"
    done = pentad("chat", question, "--model", smollm2, *GREEDY, "--json")
    assert (done.code, done.err) == (0, "")
    reply = done.json
    assert set(reply) == FIELDS
    assert set(reply["seconds"]) == {"load", "prefill", "decode"}
    expected = package.load(smollm2).chat(question, temperature=0, max_tokens=8)
    assert reply["text"] == expected.text
    assert "Paris" in reply["text"]
    assert reply["token_ids"] == expected.token_ids
    assert reply["prompt_token_ids"] == expected.prompt_token_ids
    assert (reply["finish_reason"], reply["model"]) == (expected.finish_reason, str(smollm2))
    assert reply["prompt_tokens"] == len(reply["prompt_token_ids"])
    assert reply["completion_tokens"] == len(reply["token_ids"])


@pytest.mark.parametrize("argument", [[], ["-"]])
def test_chat_reads_standard_input(pentad, smollm2: Path, argument: list[str]) -> None:
    command = ["--model", smollm2, "--max-tokens", "1", "--system", "Be brief.", "--json"]
    reply = pentad("chat", *argument, *command, stdin="Grüße\n".encode()).json
    assert reply["prompt_token_ids"] == pentad("chat", "Grüße", *command).json["prompt_token_ids"]


def test_text_output_equals_the_json_text(pentad, smollm2: Path) -> None:
    command = ["complete", "The capital of France is", "--model", smollm2, *GREEDY, "--stop", "The"]
    reply = pentad(*command, "--json").json
    assert reply["finish_reason"] == "stop"
    done = pentad(*command)
    assert (done.code, done.out, done.err) == (0, reply["text"] + "\n", "")


def test_complete_keeps_the_newline_of_standard_input(pentad, smollm2: Path) -> None:
    command = ["--model", smollm2, "--max-tokens", "1", "--json"]
    reply = pentad("complete", "-", *command, stdin=b"a\n").json
    assert reply["prompt_token_ids"] == pentad("complete", "a\n", *command).json["prompt_token_ids"]


def test_control_strings_are_text_without_special(pentad, smollm2: Path) -> None:
    command = ["complete", "<|im_end|>", "--model", smollm2, "--max-tokens", "1", "--json"]
    assert pentad(*command).json["prompt_tokens"] > 1
    assert pentad(*command, "--special").json["prompt_tokens"] == 1


def test_logprobs_and_seeds(pentad, smollm2: Path) -> None:
    command = ["chat", "Hi", "--model", smollm2, "--max-tokens", "3", "--seed", "3", "--json"]
    reply = pentad(*command, "--logprobs", "2").json
    assert [entry["token_id"] for entry in reply["logprobs"]] == reply["token_ids"]
    assert all(len(entry["top"]) == 2 for entry in reply["logprobs"])
    assert pentad(*command).json["token_ids"] == reply["token_ids"]


def test_score(pentad, smollm2: Path, tmp_path: Path) -> None:
    text = "The cat sat on the mat. The dog sat on the log.\n"
    file = tmp_path / "text"
    file.write_text(text)
    done = pentad("score", file, "--model", smollm2, "--json")
    expected = package.load(smollm2).score(text)
    assert done.json["tokens"] == expected.tokens
    assert done.json["log_likelihood"] == pytest.approx(expected.log_likelihood)
    assert done.json["perplexity"] == pytest.approx(expected.perplexity)
    read = pentad("score", "-", "--model", smollm2, stdin=text.encode())
    assert read.out.startswith(f"{expected.tokens} tokens, log-likelihood ")

    given = pentad("score", "-", "--given", "The capital of France is", "--model", smollm2, "--json", stdin=b" Paris")
    assert given.json["tokens"] == 1
    assert given.json["greedy"] is True
    short = ["score", file, "--model", smollm2, "--context", "8", "--json"]
    assert "--stride" in pentad(*short).error
    assert pentad(*short, "--stride", "4").json["tokens"] == expected.tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", " \n", "--json"], "the prompt is empty"),
        (["complete", "", "--json"], "the prompt is empty"),
        (["chat", "x " * 100, "--context", "64", "--json"], "context of 64"),
        (["chat", "x " * 100, "--context", "64", "--truncate", "--json"], "shorten it"),
        (["complete", "x " * 100, "--context", "64", "--json"], "context of 64"),
        (["chat", "hi", "--context", "100000"], "100000"),
        (["chat", "hi", "--device", "abacus"], "abacus"),
        (["chat", "hi", "--quantize", "q1"], "q1"),
        (["chat", "hi", "--temperature", "nan"], "temperature"),
        (["complete", "a\udcff"], "PROMPT"),
    ],
)
def test_invalid_arguments_are_refused(pentad, smollm2: Path, arguments: list[str], message: str) -> None:
    done = pentad(*arguments, "--model", smollm2)
    assert done.code == 2
    assert message in done.error


SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "yes"]}}, "required": ["a"]}


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_a_text_is_json_of_a_schema(pentad, tmp_path: Path, command: str) -> None:
    talking_checkpoint(tmp_path / "model")
    (tmp_path / "schema.json").write_text(json.dumps({**SCHEMA, "additionalProperties": False}))
    options = [
        "--model",
        tmp_path / "model",
        "--schema",
        tmp_path / "schema.json",
        "--seed",
        "3",
        "--max-tokens",
        "200",
    ]
    done = pentad(command, "hi", *options, "--json")
    assert json.loads(done.json["text"])["a"] in ("x", "yes")
    assert done.json["finish_reason"] == "stop"
    assert pentad(command, "hi", *options).out.rstrip("\n") == done.json["text"]

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n')
    assert pentad("complete", rows, "--out", tmp_path / "out.jsonl", *options).code == 0
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert json.loads(row["text"])["a"] in ("x", "yes")
    assert "enum" in row["generated_with"]["constraint"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("{", "is not JSON"),
        ("[]", "expected an object"),
        ('{"properties": {"a": {"uniqueItems": true}}}', "schema.json.properties.a.uniqueItems"),
        ('{"type": "colour"}', "colour"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused(pentad, tmp_path: Path, text: str | None, message: str) -> None:
    talking_checkpoint(tmp_path / "model")
    if text is not None:
        (tmp_path / "schema.json").write_text(text)
    done = pentad("complete", "hi", "--model", tmp_path / "model", "--schema", tmp_path / "schema.json")
    assert done.code == 2
    assert message in done.error


def test_a_full_context_is_noted(pentad, smollm2: Path) -> None:
    done = pentad("complete", "1 2 3 4 5 6 7 8", "--model", smollm2, "--context", "20", "--temperature", "0")
    assert done.code == 0
    assert re.search(r"context .*20 .*full", done.err)


def test_ctrl_c_in_a_step_keeps_the_text_so_far(pentad, smollm2: Path, monkeypatch) -> None:
    steps = []
    for step_class in (PlainStep, PlanStep):
        run = step_class.__call__

        def step(self, *arguments, run=run):
            steps.append(1)
            if len(steps) == 4:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)  # timeout(1) sends it twice
            return run(self, *arguments)

        monkeypatch.setattr(step_class, "__call__", step)
    done = pentad("chat", "Count to one hundred.", "--model", smollm2, "--temperature", "0", "--json")
    assert (done.code, done.err) == (130, "")
    assert done.json["finish_reason"] == "interrupted"
    assert done.json["completion_tokens"] == len(done.json["token_ids"]) == len(steps) == 4
    assert done.json["text"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_loading(pentad, monkeypatch) -> None:
    def load(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("pentad.loading.load", load)
    done = pentad("complete", "a", "--json")
    assert done.code == 130
    assert set(done.json) == FIELDS
    assert (done.json["text"], done.json["finish_reason"]) == ("", "interrupted")
    done = pentad("complete", "a")
    assert (done.code, done.out, done.err) == (130, "", "interrupted\n")


def test_ctrl_c_before_the_first_step(pentad, smollm2: Path, monkeypatch) -> None:
    def stream(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("pentad.generate.LanguageModel.stream", stream)
    done = pentad("complete", "a", "--model", smollm2, "--json")
    assert (done.code, done.json["finish_reason"]) == (130, "interrupted")


def test_ctrl_c_in_a_separate_process(smollm2: Path) -> None:
    # at this temperature generation never ends by itself
    command = ["chat", "Talk.", "--model", str(smollm2), "--temperature", "50", "--top-p", "1"]
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "pentad", *command, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stderr is not None
        assert any("pentad.loading" in line for line in process.stderr)  # the import precedes loading
        time.sleep(1)  # the interrupt may come while it loads or generates
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate()
    assert process.returncode == 130
    reply = json.loads(out)
    assert set(reply) == FIELDS
    assert reply["finish_reason"] == "interrupted"


@needs_kernels
@pytest.mark.parametrize("option", [["--dtype", "float32"], ["--quantize", "none"]], ids=str)
def test_options_that_turn_the_kernels_off_are_noted(pentad, smollm2: Path, option: list[str]) -> None:
    arguments = ("complete", "once", "--model", smollm2, "--max-tokens", "1")
    assert pentad(*arguments).err == ""
    assert f"{option[0]} turns the CPU kernels off" in pentad(*arguments, *option).err


@needs_kernels
def test_weights_are_quantized_while_loading(pentad, tmp_path: Path) -> None:
    talking_checkpoint(tmp_path / "floats", hidden_size=64, intermediate_size=96)
    (tmp_path / "text").write_text("Once upon a time")
    loading = ("--model", tmp_path / "floats", "--quantize", "q8_0")
    done = pentad("score", tmp_path / "text", *loading, "--json")
    assert done.err == ""
    convert(tmp_path / "floats", tmp_path / "q.gguf", to="gguf", quantize="q8_0")
    file = pentad("score", tmp_path / "text", "--model", tmp_path / "q.gguf", "--json")
    assert done.json["log_likelihood"] == file.json["log_likelihood"]
    floats = pentad("score", tmp_path / "text", *loading[:2], "--json")
    assert floats.json["log_likelihood"] != file.json["log_likelihood"]


def test_piped_text_is_appended_to_the_prompt(pentad, smollm2: Path) -> None:
    command = ["chat", "--model", smollm2, "--max-tokens", "1", "--json"]
    both = pentad(*command, "Summarize this:", stdin=b"A text.\n").json
    assert both["prompt_token_ids"] == pentad(*command, "Summarize this:\n\nA text.").json["prompt_token_ids"]


def test_a_prompt_in_another_encoding_is_refused_at_once(pentad) -> None:
    for arguments in (["complete", "\udce4"], ["chat", "\udce4"], ["chat", "hi", "--system", "\udce4"]):
        done = pentad(*arguments, "--model", "no such model")
        assert done.code == 2
        assert "LC_ALL=C.UTF-8" in done.error


def test_a_run_without_kernels_is_noted(smollm2: Path) -> None:
    command = ["complete", "Hello", "--model", str(smollm2), "--max-tokens", "1"]
    environment = {**os.environ, "PENTAD_KERNELS": "off"}
    done = subprocess.run(
        [sys.executable, "-m", "pentad", *command], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0
    assert "PENTAD_KERNELS is off" in done.stderr
    assert done.stderr.count("\n") == 1
