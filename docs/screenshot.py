"""Write docs/chat.svg: what a terminal shows of a real chat with SmolLM2."""

import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pentad.weights.cache import cache_folder
from pentad.weights.registry import locate

COMMAND = "pentad chat --temperature 0"
SAID = ["What is the capital of France?", "Name three things to see there.", "/quit"]
PROMPT = "\n> "


def chat() -> str:
    """The screen after `SAID` was typed, one line at each prompt."""
    locate("smollm2")
    with tempfile.TemporaryDirectory() as cache:
        # The model at hand, but not the user's history.
        (Path(cache) / "models").symlink_to(cache_folder() / "models")
        terminal, side = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", *COMMAND.split()],
            stdin=side,
            stdout=side,
            stderr=side,
            env={**os.environ, "PENTAD_CACHE": cache, "TERM": "dumb"},
        )
        os.close(side)
        screen = ""
        for line in SAID:
            while not screen.endswith(PROMPT):
                screen += os.read(terminal, 4096).decode().replace("\r\n", "\n")
            os.write(terminal, f"{line}\n".encode())
            screen += os.read(terminal, 4096).decode().replace("\r\n", "\n")  # the line's echo
        process.wait()
        os.close(terminal)
    return screen.rsplit(PROMPT, 1)[0]


def picture(screen: str) -> str:
    """The screen as SVG, what was typed in bold, with no font from elsewhere."""
    console = Console(record=True, width=84, file=open(os.devnull, "w"))  # noqa: SIM115
    text = Text(f"$ {COMMAND}\n{screen}".rstrip())
    text.highlight_regex(r"(?m)^[>$] .*", "bold green")
    console.print(text)
    return re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="pentad"), flags=re.DOTALL)


if __name__ == "__main__":
    Path(__file__).with_name("chat.svg").write_text(picture(chat()))
