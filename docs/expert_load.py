"""Write docs/experts.png: the expert load of an upcycled SmolLM2 on the README."""

import subprocess
import sys
import tempfile
from pathlib import Path

from pentad.convert import convert
from pentad.upcycle import Upcycling

HERE = Path(__file__).parent


def draw(folder: str) -> None:
    """Run the documented commands; `folder` stores the upcycled model."""
    convert("smollm2", Path(folder, "upcycled-smollm2"), to="hf", upcycle=Upcycling(experts=8, top_k=2))
    (Path(folder) / "README.md").write_text((HERE.parent / "README.md").read_text())
    picture = str(HERE / "experts.png")
    options = ["--experts", "README.md", "--out", picture]
    subprocess.run([sys.executable, "-m", "pentad", "show", "upcycled-smollm2", *options], cwd=folder, check=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        draw(temporary)
