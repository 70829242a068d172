"""Interactive chat: its commands in this process, and a conversation on a pseudo-terminal."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from torch import Tensor

import pentad as package
from pentad.cli import prompting
from pentad.cli.conversation import Conversation
from pentad.cli.interactive import SETTINGS, Loop, complete_line
from pentad.generate.plan_step import PlanStep
from pentad.generate.step import PlainStep, Step, Work
from pentad.terminal import starts_conversation
from tests.helpers.tiny import talking_checkpoint

ROOT = Path(__file__).parents[2]
Chat = Callable[..., str]


@pytest.fixture(scope="module")
def model(smollm2: Path) -> package.LanguageModel:
    return package.load(smollm2, context=256)


@pytest.fixture
def conversation(model: package.LanguageModel) -> Conversation:
    return Conversation(model, {"temperature": 0, "max_tokens": 4})


@pytest.fixture
def chat(conversation: Conversation, capsys: pytest.CaptureFixture[str]) -> Chat:
    """A function that types lines and then Ctrl-D, and returns standard error."""

    def run(*lines: str | type[BaseException]) -> str:
        waiting = iter(lines)

        def read() -> str:
            line = next(waiting, EOFError)
            if isinstance(line, str):
                return line
            raise line

        Loop(conversation, read).run()
        return capsys.readouterr().err

    return run


def user_messages(conversation: Conversation) -> list[str]:
    return [m["content"] for m in conversation.messages if m["role"] == "user"]


def test_empty_messages_are_ignored(chat: Chat, conversation: Conversation) -> None:
    chat("", "  ", " /f")
    assert user_messages(conversation) == [" /f"]


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("/re", ["/reset", "/retry"]),
        ("/s", ["/save ", "/set ", "/system "]),
        ("/set top", ["top_k ", "top_p "]),
        ("/set truncate ", ["yes", "no"]),
        ("/set top_k ", []),
        ("/undo ", []),
        ("hello /re", []),
    ],
)
def test_tab_completes_commands_and_options(line: str, completed: list[str]) -> None:
    assert list(complete_line(line)[1]) == completed


def test_tab_completes_files(tmp_path: Path) -> None:
    (tmp_path / "my talk.jsonl").touch()
    (tmp_path / "my talks").mkdir()
    (tmp_path / ".hidden").touch()
    assert complete_line(f"/load {tmp_path}/my t") == (
        f"{tmp_path}/my t",
        [f"{tmp_path}/my talk.jsonl", f"{tmp_path}/my talks/"],
    )
    assert len(list(complete_line(f"/save {tmp_path}/")[1])) == 2
    assert complete_line("/load /no/such/folder/")[1] == []


def test_undo_retry_reset(chat: Chat, conversation: Conversation) -> None:
    chat("one", "two", "/undo")
    assert user_messages(conversation) == ["one"]
    before = list(conversation.messages)
    chat("/retry")
    assert conversation.messages == before
    assert "cleared" in chat("/system Be brief.", "/reset")
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    notes = chat("/undo", "/retry", "/system")
    assert "no turn to remove" in notes
    assert "no message to reply to" in notes
    assert conversation.messages == []


def test_settings(chat: Chat, conversation: Conversation) -> None:
    notes = chat("/set presence_penalty -1.5", "/set top-k=3", "/set truncate yes", "/set")
    assert conversation.options == {"temperature": 0, "max_tokens": 4, "presence_penalty": -1.5, "top_k": 3}
    assert conversation.truncate
    assert all(name in notes for name in SETTINGS)
    chat("/set top_k", "/set truncate no")
    assert "top_k" not in conversation.options
    assert not conversation.truncate


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("/nonsense", "/nonsense"),
        ("/set nonsense 1", "nonsense"),
        ("/set top_k many", "many"),
        ("/set truncate maybe", "maybe"),
        ("/set temperature -1", "temperature"),
        ("/set temperature nan", "temperature"),
        ("/save", "/save"),
        ("/load", "/load"),
        ("/load no-such-file", "no-such-file"),
    ],
)
def test_invalid_commands_are_refused(chat: Chat, conversation: Conversation, line: str, named: str) -> None:
    options = dict(conversation.options)
    (error,) = [text for text in chat(line).splitlines() if text.startswith("pentad: ")]
    assert named in error
    assert conversation.options == options


def test_save_and_load(chat: Chat, conversation: Conversation, tmp_path: Path) -> None:
    file = tmp_path / "my talk.jsonl"
    chat("one", f"/save {file}")
    before = list(conversation.messages)
    assert "2 messages" in chat("/reset", f"/load {file}")
    assert conversation.messages == before


@pytest.mark.parametrize("line", ["seed -1", "max_tokens 0", "temperature nan", "top_k 1.5", "truncate maybe"])
def test_settings_out_of_range_are_refused_at_once(chat: Chat, conversation: Conversation, line: str) -> None:
    before = dict(conversation.options)
    name, value = line.split()
    assert f"{name} is" in (notes := chat(f"/set {line}"))
    assert value in notes
    assert conversation.options == before


def test_a_message_beyond_the_context_is_refused_or_truncates(chat: Chat, conversation: Conversation) -> None:
    chat("Hi. " * 40, "Ho. " * 40)
    assert "256" in chat("Hu. " * 40)  # refused, and the chat continues
    assert [text[:2] for text in user_messages(conversation)] == ["Hi", "Ho"]
    notes = chat("/set truncate yes", "Hu. " * 40, "/tokens")
    assert '2 oldest turns, beginning with "Hi. Hi.' in notes
    assert [text[:2] for text in user_messages(conversation)] == ["Hu"]
    assert "of 256 tokens" in notes


def test_a_reply_that_fills_the_context(chat: Chat, conversation: Conversation) -> None:
    conversation.options = {"temperature": 50, "top_p": 1, "seed": 0}  # a reply never ends by itself
    assert "the context is full" in chat("Hi. " * 100)


def test_leaving_the_chat(chat: Chat) -> None:
    chat("/quit", AssertionError)
    chat(KeyboardInterrupt, "/tokens", KeyboardInterrupt, EOFError)
    with pytest.raises(KeyboardInterrupt):
        chat(KeyboardInterrupt, KeyboardInterrupt)


def test_typed_bytes_that_are_not_utf_8(chat: Chat, conversation: Conversation) -> None:
    class Broken(UnicodeDecodeError):
        def __init__(self) -> None:
            super().__init__("utf-8", b"\xff", 0, 1, "invalid start byte")

    notes = chat(Broken, "a\udcff", "b")
    assert ["UTF-8" in note or "surrogate" in note for note in notes.splitlines() if note.startswith("pentad: ")] == [
        True,
        True,
    ]
    assert user_messages(conversation) == ["b"]


def press_ctrl_c(monkeypatch: pytest.MonkeyPatch, step_number: int, times: int) -> None:
    """Press Ctrl-C during a step, the most difficult moment to stop."""
    steps: list[int] = []
    for step_class in (PlainStep, PlanStep):
        run = step_class.__call__

        def step(self: Step, work: Work, wanted: Sequence[int], run: Callable[..., Tensor] = run) -> Tensor:
            steps.append(1)
            if len(steps) == step_number:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            return run(self, work, wanted)

        monkeypatch.setattr(step_class, "__call__", step)


def test_ctrl_c_stops_a_reply(chat: Chat, conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation.options["max_tokens"] = 12
    press_ctrl_c(monkeypatch, step_number=3, times=1)
    chat("Write a story.", "And?")
    first, reply, second, other = (message["content"] for message in conversation.messages)
    assert (first, second) == ("Write a story.", "And?")
    assert 3 <= len(conversation.model.tokenizer.encode(reply)) < 6
    assert len(other) > len(reply)


def test_a_second_ctrl_c_removes_the_message(
    chat: Chat, conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pentad.cli.interrupts.ECHO", 0)
    press_ctrl_c(monkeypatch, step_number=1, times=2)
    assert "Ctrl-C again" in chat("one", "two")
    assert user_messages(conversation) == ["two"]


PASTE_ON, PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, *command: str, **environment: str) -> None:
        self.screen = ""
        self._terminal, child_side = pty.openpty()
        self.modes = termios.tcgetattr(child_side)
        self.process = subprocess.Popen(
            command,
            stdin=child_side,
            stdout=child_side,
            stderr=child_side,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "PYTHONUTF8": "1", **environment},
            start_new_session=True,
        )
        os.close(child_side)

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait_for(self, text: str, *, times: int = 1) -> str:
        """Wait until `text` is on the screen; returns the output since the last call."""
        for _ in range(1200):  # at most two minutes
            if self.screen.count(text) >= times:
                at = -1
                for _ in range(times):
                    at = self.screen.index(text, at + 1)
                seen, self.screen = self.screen[:at], self.screen[at + len(text) :]
                return seen
            if select.select([self._terminal], [], [], 0.1)[0]:
                try:
                    self.screen += os.read(self._terminal, 4096).decode(errors="replace")
                except OSError:  # Linux raises it when the process has closed its side
                    break
        raise AssertionError(f"{text!r} was not written: {self.screen!r}")

    def wait(self) -> int:
        """Read until the process ends; returns its exit code, after a check that the terminal is as before."""
        for _ in range(300):
            if select.select([self._terminal], [], [], 0.1)[0]:
                try:
                    self.screen += os.read(self._terminal, 4096).decode(errors="replace")
                except OSError:
                    break
            elif self.process.poll() is not None:
                break
        assert termios.tcgetattr(self._terminal) == self.modes
        assert self.screen.rfind(PASTE_OFF) >= self.screen.rfind(PASTE_ON)
        return self.process.wait(5)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)


@pytest.fixture
def terminal(smollm2: Path, tmp_path: Path) -> Iterator[Terminal]:
    command = [sys.executable, "-m", "pentad", "chat", "--model", str(smollm2)]
    terminal = Terminal(*command, "--temperature", "0", PENTAD_CACHE=str(tmp_path))
    yield terminal
    terminal.close()


def ready(terminal: Terminal, times: int = 1) -> str:
    """Wait until a prompt is drawn; returns the output since the last call."""
    return terminal.wait_for(">\x08\x1b[2C", times=times)


def user_texts(file: Path) -> list[str]:
    messages = json.loads(file.read_text().splitlines()[-1])["messages"]
    return [message["content"] for message in messages if message["role"] == "user"]


def test_a_conversation_at_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    file, history = tmp_path / "talk.jsonl", tmp_path / "history"
    terminal.wait_for(PASTE_ON)
    terminal.type("What is the capital of France?\r")  # before the first prompt
    assert "France" not in terminal.wait_for("/help lists commands")
    terminal.wait_for("Paris")
    ready(terminal)
    terminal.type("And of\\\rItaly?\r")
    terminal.wait_for("Rome")
    ready(terminal)
    terminal.type("\x1b[200~Say\none\\\nor\ntwo.\x1b[201~\r")
    ready(terminal)
    terminal.type('"""a\r\rb"""\r')
    terminal.wait_for('b"""')
    ready(terminal)
    terminal.type("not sent\x03/sav\t" + f"{tmp_path}/tal\x7fl" + "k.jsonl\r")
    terminal.wait_for("(added to ")
    assert user_texts(file) == ["What is the capital of France?", "And of\nItaly?", "Say\none\\\nor\ntwo.", "a\n\nb"]
    ready(terminal)

    terminal.type("/reset\r")
    terminal.wait_for("cleared)")
    ready(terminal)
    terminal.type("Write a very long story about a very long road.\r")
    terminal.wait_for("road.", times=1)
    terminal.wait_for("the ", times=2)
    terminal.type("/tokens")  # while the reply streams
    time.sleep(0.5)
    terminal.process.send_signal(signal.SIGINT)
    assert "/tokens" not in ready(terminal)
    terminal.type("\r")
    assert int(terminal.wait_for(" of 8192 tokens").rpartition("(")[2]) > 10
    ready(terminal)

    terminal.type("\x03")
    terminal.wait_for("to leave)")
    ready(terminal)
    terminal.type("\x04")
    assert terminal.wait() == 0
    assert "+What is the capital of France?" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("moment", ["loading", "prompt", "reply"])
def test_a_terminated_conversation_restores_the_terminal(terminal: Terminal, moment: str) -> None:
    terminal.wait_for("loading ")
    if moment != "loading":
        ready(terminal)
    if moment == "reply":
        terminal.type("Write a very long story about a very long road.\r")
        terminal.wait_for("the ", times=2)
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.wait() == 143


def test_history_is_bounded_and_kept_between_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENTAD_CACHE", str(tmp_path))
    first = prompting.history()
    for number in range(prompting.ENTRIES + 5):
        first.store_string(f"message {number}\nsecond line")
    latest, *older = prompting.history().load_history_strings()
    assert latest == f"message {prompting.ENTRIES + 4}\nsecond line"
    assert len(older) == prompting.ENTRIES - 1
    first.store_string("a\udcff")
    monkeypatch.setenv("PENTAD_CACHE", str(tmp_path / "history"))  # a file where the folder should be
    assert list(prompting.history().load_history_strings()) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return talking_checkpoint(tmp_path / "talking").folder


def test_the_echo_is_off_before_the_command_line_is_imported() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "pentad", "chat", "--model", "no-such-model"]
    with closing(Terminal(*command)) as terminal:
        before = terminal.wait_for(PASTE_ON)
        assert "pentad.terminal" in before
        assert "typer" not in before
        assert terminal.wait() == 2


def test_a_prompt_after_an_option_restores_the_terminal_at_once(folder: Path) -> None:
    arguments = ["chat", "--model", str(folder), "--max-tokens", "1", "--json", "Hi"]
    assert starts_conversation(arguments)  # --json could have a value
    with closing(Terminal(sys.executable, "-m", "pentad", *arguments)) as terminal:
        terminal.wait_for(PASTE_ON)
        terminal.wait_for(PASTE_OFF)
        terminal.wait_for('"finish_reason"')
        assert terminal.wait() == 0


def test_a_dumb_terminal_gets_no_escape_sequences(folder: Path) -> None:
    command = [sys.executable, "-m", "pentad", "chat", "--model", str(folder), "--max-tokens", "1"]
    with closing(Terminal(*command, TERM="dumb", PENTAD_CACHE=str(folder))) as terminal:
        seen = terminal.wait_for("> ")
        terminal.type("Hi\n")
        seen += terminal.wait_for("> ")
        terminal.type("/quit\n")
        assert terminal.wait() == 0
        assert "\x1b" not in seen + terminal.screen


@pytest.mark.skipif(shutil.which("setsid") is None, reason="setsid makes the terminal that of the session")
def test_a_job_in_the_background_leaves_the_terminal_alone(folder: Path) -> None:
    """The system would stop it if it changed the terminal."""
    chat = f"'{sys.executable}' -m pentad chat --model '{folder}' --max-tokens 1 --json Hi < /dev/tty"
    with closing(Terminal("setsid", "--ctty", "bash", "-mc", f"{chat} & wait; echo done")) as terminal:
        assert PASTE_ON not in terminal.wait_for('"finish_reason"')
        terminal.wait_for("done")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("chat", True),
        ("run --verbose -m smollm2", True),
        ("--debug chat --temperature 0", True),
        ("chat hi", False),
        ("chat --seed 1 hi", False),
        ("chat --help", False),
        ("complete chat", False),
        ("", False),
    ],
)
def test_a_conversation_is_recognized_by_its_command_line(line: str, expected: bool) -> None:
    assert starts_conversation(line.split()) is expected
