"""Write docs/segment.png: the page of `pentad segment --view` after a few clicks on a drawn scene.

Needs `sam-scenes` (`pentad pull sam-scenes`), Playwright and a Chromium.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from pentad.datasets.scenes import Scenes
from pentad.media.images import write_image
from pentad.vision.clicks import next_click

SCENE, SIZE = 4, 160
OUT = Path(__file__).with_name("segment.png")


def main() -> None:
    """Click on each object, accept its mask with its label, and click on the first one again."""
    scenes = Scenes(SCENE + 1, seed=99, size=SIZE, held_out=True)
    sample = scenes[SCENE]
    clicks = [next_click(mask.logical_and(~mask), mask) for mask in sample.masks]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "scene.png"
        write_image(file, sample.image)
        command = [sys.executable, "-m", "pentad", "segment", file, "--view", "--no-browser", "--json"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 960, "height": 690})
            page.goto(url)
            page.wait_for_selector("#everything:enabled")
            box = page.locator("#canvas").bounding_box()
            assert box is not None
            for number, (click, label) in enumerate(zip(clicks, sample.labels.tolist(), strict=True)):
                assert click is not None
                x, y = ((at + 0.5) / SIZE * box["width"] for at in click[:2])
                page.locator("#canvas").click(position={"x": x, "y": y})
                page.wait_for_selector("#accept:enabled")
                page.wait_for_timeout(500)
                if number < len(clicks) - 1:
                    page.fill("#label", scenes.names[label])
                    page.click("#accept")
                    page.wait_for_timeout(500)
            page.screenshot(path=OUT)
            browser.close()
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
