"""Write docs/chat.svg: a terminal's screen after a real chat with SmolLM2."""

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
INPUTS = ["What is the capital of France?", "Name three things to see there.", "/quit"]
PROMPT = "\n> "


def chat() -> str:
    """Type one line of `INPUTS` at each prompt; returns the screen."""
    locate("smollm2")
    with tempfile.TemporaryDirectory() as cache:
        # Use the user's models, but not the user's chat history.
        (Path(cache) / "models").symlink_to(cache_folder() / "models")
        terminal, child_side = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", *COMMAND.split()],
            stdin=child_side,
            stdout=child_side,
            stderr=child_side,
            env={**os.environ, "PENTAD_CACHE": cache, "TERM": "dumb"},
        )
        os.close(child_side)
        screen = ""
        for line in INPUTS:
            while not screen.endswith(PROMPT):
                screen += os.read(terminal, 4096).decode().replace("\r\n", "\n")
            os.write(terminal, f"{line}\n".encode())
            screen += os.read(terminal, 4096).decode().replace("\r\n", "\n")  # the line's echo
        process.wait()
        os.close(terminal)
    return screen.rsplit(PROMPT, 1)[0]


def picture(screen: str) -> str:
    """Draw the screen as SVG, with typed lines in bold and without web fonts."""
    console = Console(record=True, width=84, file=open(os.devnull, "w"))  # noqa: SIM115
    text = Text(f"$ {COMMAND}\n{screen}".rstrip())
    text.highlight_regex(r"(?m)^[>$] .*", "bold green")
    console.print(text)
    return re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="pentad"), flags=re.DOTALL)


if __name__ == "__main__":
    Path(__file__).with_name("chat.svg").write_text(picture(chat()))
