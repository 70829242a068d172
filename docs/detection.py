"""Write docs/dog.jpg: what `pentad detect dog.jpg --out DIR` draws on Darknet's photo of a dog.

    python docs/detection.py dog.jpg

The photo is data/dog.jpg of pjreddie/darknet, which is in the public domain.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pentad", "detect", sys.argv[1], "--out", folder], check=True)
        shutil.copy(Path(folder) / "dog.jpg", Path(__file__).with_name("dog.jpg"))
