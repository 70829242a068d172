"""Write docs/experts.png: what the routers of an upcycled SmolLM2 do with the README."""

import subprocess
import sys
import tempfile
from pathlib import Path

from pentad.convert import convert
from pentad.upcycle import Upcycling

HERE = Path(__file__).parent


def draw(folder: str) -> None:
    """What a reader would type; `folder` is where the model may lie meanwhile."""
    convert("smollm2", Path(folder, "upcycled-smollm2"), to="hf", upcycle=Upcycling(experts=8, top_k=2))
    (Path(folder) / "README.md").write_text((HERE.parent / "README.md").read_text())
    picture = str(HERE / "experts.png")
    options = ["--experts", "README.md", "--out", picture]
    subprocess.run([sys.executable, "-m", "pentad", "show", "upcycled-smollm2", *options], cwd=folder, check=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        draw(temporary)
