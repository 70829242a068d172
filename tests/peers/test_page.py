"""The page of `pentad segment --view` in Chromium."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pentad.datasets.coco import read_coco
from pentad.media.images import read_image, write_image
from tests.helpers.sam import meta_sam
from tests.serve.conftest import eventually
from tests.vision.test_segmenter import photo

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (dependency group peers)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
PATIENCE = 120_000  # ms


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("page")
    meta_sam(folder / "sam.pth")
    write_image(folder / "photo.png", photo(240, 360))
    command = ["segment", folder / "photo.png", "-m", folder / "sam.pth", "--view", "--no-browser", "--json"]
    command += ["--out", folder / "out", "--threads", "1"]
    with subprocess.Popen([sys.executable, "-m", "pentad", *map(str, command)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.terminate()


@pytest.fixture
def page(ready: dict[str, Any]) -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 700})
        page.set_default_timeout(PATIENCE)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: errors.append(request.url) if "127.0.0.1" not in request.url else None)
        page.goto(ready["url"])
        until(page, "document.querySelector('#status').textContent === 'Ready'")
        yield page
        browser.close()
        assert not [error for error in errors if not error.startswith("blob:")]


def until(page: Any, condition: str) -> None:
    """Wait for a condition; the page's policy forbids Playwright's own way, which is `eval`."""
    eventually(lambda: page.evaluate(condition) or page.wait_for_timeout(10))


def act(page: Any, action: Any) -> None:
    """Do something, and wait until the answer is shown."""
    turn = page.evaluate("turn")
    action()
    until(page, f"turn > {turn} && !working && +canvas.dataset.painted === turn")


def click(page: Any, x: float, y: float, *modifiers: str, button: str = "left") -> None:
    box = page.locator("#canvas").bounding_box()
    position = {"x": x * box["width"], "y": y * box["height"]}
    act(page, lambda: page.locator("#canvas").click(position=position, modifiers=[*modifiers], button=button))


def labels(page: Any) -> list[int]:
    return page.evaluate("prompt.points.map(point => point.label)")


def test_hovering_clicking_undoing_and_boxes(page: Any) -> None:
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 90)
    until(page, "hovered !== null")
    click(page, 0.4, 0.4)
    assert page.evaluate("answers.length") == 3
    click(page, 0.7, 0.7, "Shift")
    click(page, 0.2, 0.7, button="right")
    assert labels(page) == [1, 0, 0]
    click(page, 0.7, 0.7)
    assert labels(page) == [1, 0]
    act(page, lambda: page.keyboard.press("Control+z"))
    assert labels(page) == [1, 0, 0]
    act(page, lambda: page.keyboard.press("Control+y"))
    assert labels(page) == [1, 0]
    page.mouse.move(box["x"] + 40, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 300, box["y"] + 250, steps=3)
    act(page, page.mouse.up)
    assert page.evaluate("prompt.box.map(Math.round)") == page.evaluate(
        "[40, 40, 300, 250].map(side => Math.round(side * size.width / canvas.clientWidth))"
    )
    act(page, lambda: page.keyboard.press("Escape"))
    assert page.evaluate("isEmpty() && answers.length === 0")


def test_masks_are_accepted_corrected_saved_and_exported(page: Any, ready: dict[str, Any]) -> None:
    file = Path(ready["file"])
    click(page, 0.5, 0.5)
    rle = page.evaluate("answers[chosen].rle")
    page.fill("#label", "spot")
    act(page, lambda: page.click("#accept"))
    until(page, "document.querySelector('#status').textContent.startsWith('Saved 1')")
    [row] = json.loads(file.read_text())["annotations"]
    assert row["segmentation"] == rle
    dataset = read_coco(file, file.parents[1])
    assert (dataset.names, len(dataset.images[0].objects)) == (("spot",), 1)
    act(page, lambda: page.click("li button[title=Correct]"))
    click(page, 0.9, 0.1, "Shift")
    act(page, lambda: page.keyboard.press("Enter"))
    until(page, "masks.length === 1 && masks[0].label === 'spot'")
    page.reload()
    until(page, "masks.length === 1 && document.querySelector('#status').textContent === 'Ready'")
    with page.expect_download() as downloaded:
        page.click("li button[title='Save this mask as PNG']")
    pixels = read_image(downloaded.value.path())
    assert pixels.shape == (3, 240, 360)
    row = json.loads(file.read_text())["annotations"][0]
    assert int((pixels[0] == 255).sum()) == row["area"]
    with page.expect_download() as downloaded:
        page.click("#coco")
    assert json.loads(Path(downloaded.value.path()).read_text())["annotations"][0]["bbox"] == row["bbox"]
    page.click("li button[title=Delete]")
    until(page, "document.querySelector('#status').textContent.startsWith('Saved 0')")


def test_everything_and_small_windows(page: Any) -> None:
    page.set_viewport_size({"width": 400, "height": 700})
    page.click("#everything")
    until(page, "/proposals$/.test(document.querySelector('#status').textContent)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    canvas = page.locator("#canvas").bounding_box()
    assert canvas["width"] > 300
    assert page.locator("#words").is_disabled()
