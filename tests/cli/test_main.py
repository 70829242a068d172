"""Every command: exit codes, one-line errors, standard output and standard error."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import pentad as package
from pentad.cli import application, output
from pentad.weights import registry

COMMANDS: Any = typer.main.get_command(application())


def test_version(pentad) -> None:
    done = pentad("--version")
    assert (done.code, done.out, done.err) == (0, f"pentad {package.__version__}\n", "")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["chat", "--help"]])
def test_help(pentad, arguments: list[str]) -> None:
    done = pentad(*arguments)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Usage: pentad")


def test_every_command_has_json_and_help() -> None:
    names = """chat complete score classify detect segment models pull rm show convert merge train serve evaluate
        reproduce bench env data"""
    known = {name: command for name, command in COMMANDS.commands.items() if not command.hidden}
    assert known.keys() == {*names.split()}
    group = known.pop("data")
    for command in (*known.values(), *group.commands.values()):
        assert "--json" in [option for parameter in command.params for option in parameter.opts]
        assert command.help
        assert all(parameter.help for parameter in command.params if parameter.name != "help")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nonsense"], "nonsense"),
        (["chat", "--nonsense"], "--nonsense"),
        (["--json", "chat"], "--json"),
        (["chat", "hi", "--temperature", "-1"], "--temperature"),
        (["chat", "hi", "--temperature", "warm"], "--temperature"),
        (["chat", "hi", "--top-p", "1.5"], "--top-p"),
        (["chat", "hi", "--max-tokens", "0"], "--max-tokens"),
        (["chat", "hi", "--seed", "-1"], "--seed"),
        (["chat", "hi", "--dtype", "int3"], "--dtype"),
        (["chat", "hi", "--threads", "0"], "--threads"),
        (["chat", "hi", "--context", "0"], "--context"),
        (["chat", "hi", "--logprobs", "2"], "--json"),
        (["chat", "hi", "there"], "there"),
        (["score"], "FILE"),
        (["score", "-", "--stride", "0"], "--stride"),
        (["bench", "--prompt", "1,x"], "--prompt"),
        (["bench", "--batch", "0"], "--batch"),
        (["bench", "--prompt", "0", "--generate", "0"], "--prompt"),
        (["show", "smollm2", "--quantize", "q0"], "q0"),
        (["rm", "smollm2"], "--yes"),
    ],
)
def test_invalid_usage_is_one_line_and_exit_code_2(pentad, arguments: list[str], named: str) -> None:
    done = pentad(*arguments)
    assert done.code == 2
    assert named in done.error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["chat", "hi", "--json", "--model", "nobody"], "nobody"),
        (["complete", "hi", "--json", "--model", "./nobody.gguf"], "nobody.gguf"),
        (["show", "--json", "./nobody"], "./nobody"),
        (["pull", "--json", "nobody"], "nobody"),
        (["rm", "--json", "--yes", "nobody"], "nobody"),
        (["bench", "--json", "nobody"], "nobody"),
        (["convert", "--json", "nobody", "there", "--to", "hf"], "nobody"),
        (["merge", "--json", "nobody", "adapter", "there"], "nobody"),
        (["score", "--json", "no-such-file.txt"], "no-such-file.txt"),
        (["score", "--json", "."], "directory"),
    ],
)
def test_unknown_names_and_files(pentad, arguments: list[str], named: str) -> None:
    done = pentad(*arguments)
    assert done.code == 2
    assert named in done.error


@pytest.mark.parametrize("command", [["chat"], ["chat", "-"], ["complete"], ["score", "-"]])
def test_input_that_is_not_text(pentad, command: list[str]) -> None:
    done = pentad(*command, stdin=b"caf\xe9")
    assert done.code == 2
    assert "UTF-8 (byte 3)" in done.error


def test_an_unexpected_error_is_one_line_and_exit_code_1(pentad, monkeypatch) -> None:
    def fail() -> None:
        raise RuntimeError("first line\nsecond \x1b[31mline")

    monkeypatch.setattr(registry, "known", fail)
    done = pentad("models")
    assert done.code == 1
    assert done.error.startswith("pentad: RuntimeError: first line second ␛[31mline")
    assert "--debug" in done.error


@pytest.mark.parametrize("arguments", [["--debug", "rm", "x"], ["rm", "x", "--debug"]])
def test_debug_shows_the_traceback(pentad, arguments: list[str]) -> None:
    done = pentad(*arguments)
    assert done.code == 2
    assert "Traceback" in done.err
    assert "BadInput" in done.err


def test_debug_after_double_dash_is_a_prompt(pentad) -> None:
    done = pentad("complete", "--model", "nobody", "--", "--debug")
    assert done.code == 2
    assert "nobody" in done.error


@pytest.mark.parametrize("flags", [["--verbose"], ["--debug", "--verbose"]])
def test_verbose_names_the_backend(pentad, smollm2: Path, flags: list[str]) -> None:
    ran = [pentad(*flags, "complete", "one", "--max-tokens", 1), pentad("complete", "one", "--max-tokens", 1, *flags)]
    for done in ran:
        assert done.code == 0
        assert done.err.startswith("pentad: smollm2 runs ")
        assert done.err.count("\n") == 1
    assert pentad("complete", "one", "--max-tokens", 1).err == ""


def test_ctrl_c_gives_exit_code_130(pentad, monkeypatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "known", interrupted)
    done = pentad("models")
    assert (done.code, done.out, done.err) == (130, "", "interrupted\n")


@pytest.mark.parametrize("argument", ["models", "--help"])
def test_a_closed_output_pipe_is_silent(argument: str) -> None:
    command = [sys.executable, "-m", "pentad", argument]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--temperature", "nan"], "--temperature is nan; expected a number from 0 to 100"),
        (["--temperature", "hot"], "--temperature is hot; expected a number from 0 to 100"),
        (["--top-k", "-1"], "--top-k is -1; expected a whole number from 0"),
        (["--max-tokens", "1.5"], "--max-tokens is 1.5; expected a whole number from 1"),
        (["--dtype", "int3"], "--dtype is int3; expected one of float32, bfloat16, float16"),
        (["--device", "xyz"], "device is xyz; expected one of cpu, cuda, mps"),
    ],
    ids=str,
)
def test_options_out_of_range(pentad, arguments: list[str], facts: str) -> None:
    done = pentad("complete", "hi", *arguments)
    assert done.code == 2
    assert facts in done.error


def test_names_that_users_of_other_tools_know(pentad) -> None:
    assert pentad("list").out == pentad("models").out
    assert pentad("run", "-h").out.splitlines()[1:] == pentad("chat", "--help").out.splitlines()[1:]


def test_sizes() -> None:
    written = [output.size(n) for n in (0, 999, 1000, 98_362_432, 7 * 10**9, 3 * 10**15)]
    assert written == ["0 bytes", "999 bytes", "1.0 kB", "98.4 MB", "7.0 GB", "3000.0 TB"]


def test_control_characters_are_shown_as_symbols(capsys) -> None:
    output.write("\x1b[2J\n\tü\x9b")
    output.write_table([("a\nb", "\x1b[2J"), ("c", "\t")])
    assert capsys.readouterr().out == "␛[2J\n\tü\ufffda␊b  ␛[2J\nc    ␉\n"
    output.write_json("\x1b\x9b")
    assert capsys.readouterr().out == '"\\u001b\\u009b"\n'


def test_generated_text_is_unchanged_in_a_file(capsys, monkeypatch) -> None:
    with output.generated() as write:
        write("\x1b[2J\n\tü\x9b ")
    assert capsys.readouterr().out == "\x1b[2J\n\tü\x9b "
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with output.generated() as write:
        write("\x1b[2J\nü\x9b ")
    assert capsys.readouterr().out == "␛[2J\nü\ufffd"


def test_json_has_no_nan(capsys) -> None:
    output.write_json({"text": "日本"})
    assert json.loads(capsys.readouterr().out) == {"text": "日本"}
    with pytest.raises(ValueError, match="JSON"):
        output.write_json({"x": float("nan")})


def test_no_progress_without_a_terminal(monkeypatch) -> None:
    assert output.progress() is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert output.progress() is not None


def test_progress_bars_are_on_standard_error(capsys, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich assume a terminal
    bars = output.Bars()
    for total in (100, None):
        bars.start("fetching [x]", total)
        bars.advance(50)
        bars.finish()
    bars.advance(1)
    bars.finish()
    written = capsys.readouterr()
    assert written.out == ""
    assert "fetching [x]" in written.err


def test_a_command_alone_is_the_one_of_the_whole_command_line() -> None:
    for name, command in COMMANDS.commands.items():
        alone = typer.main.get_command(application(name)).commands
        assert list(alone) == [name]
        assert [p.opts for p in alone[name].params] == [p.opts for p in command.params]
        assert alone[name].hidden == command.hidden
