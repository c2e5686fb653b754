"""
The page of `epmvg demo` in a browser, used by the keyboard alone. That needs Chromium, and what
`pip install "epmvg_hf[demo]" playwright` installs.
"""

import base64
import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline

from epmvg_hf.commands.demo import EXAMPLES
from epmvg_hf.commands.demo_answer import COLUMNS
from epmvg_hf.commands.grounder import SHIPPED_MODEL
from epmvg_hf.evaluation.drawing import COLOURS, draw_boxes, draw_map
from tests.fixtures.paths import ROOT

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

PHOTO = ROOT / "examples" / "images" / "astronaut.jpg"
EXPRESSIONS = ["the woman in the orange suit", "the <b>helmet</b> ${1} {{2}}"]  # shown as it is
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where `epmvg demo` serves the shipped model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("demo") / "log.txt"
    command = [sys.executable, "-m", "epmvg_hf", "demo", "--device", "cpu", "--port", str(port)]
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."})
    try:
        wait_for(f"http://127.0.0.1:{port}/", server, log)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(30)


def wait_for(address, server, log):
    deadline = time.monotonic() + 240  # a few seconds where nothing else runs
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"no answer from {address}: {log.read_text()}")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        # The sandbox does not run as root, and this page is our own.
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(params=[DESKTOP], ids=["desktop"])
def page(browser, address, request):
    """A page that has loaded, and that asks nobody but its own server for anything."""
    page = browser.new_page(viewport=request.param)
    page.set_default_timeout(90_000)  # milliseconds
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("filechooser", lambda _: None)  # so that the browser gives choosers to us before the first one opens
    page.goto(address)
    page.locator("textarea").wait_for()
    page.locator("td img").first.wait_for()  # the examples come last
    yield page
    page.close()
    assert asked and [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


@pytest.fixture(scope="module")
def results():
    """What the pipeline finds."""
    return pipeline("visual-grounding", model=str(SHIPPED_MODEL), device="cpu")(
        str(PHOTO), EXPRESSIONS, return_maps=True
    )


def tab_to(page, selector):
    """Goes on by the tab key until an element has the focus."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"{selector} cannot be reached by the tab key")


def upload(page, path):
    tab_to(page, "button[aria-label*='upload']")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(path)
    page.get_by_label("Remove Image").wait_for()


def write(page, expressions):
    tab_to(page, "textarea")
    for number, expression in enumerate(expressions):
        if number:
            page.keyboard.press("Enter")
        page.keyboard.type(expression)


def table(page) -> list[list[str]]:
    rows = page.locator("#found tr")
    rows.first.wait_for()
    return [row.locator("th, td").all_inner_texts() for row in rows.all()]


def maps(page) -> list[np.ndarray]:
    sources = [image.get_attribute("src") for image in page.locator("#found figure img").all()]
    files = [io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))) for source in sources]
    return [np.asarray(Image.open(file)).astype(int) for file in files]


@pytest.mark.parametrize("page", [DESKTOP, PHONE], ids=["desktop", "phone"], indirect=True)
def test_two_expressions(page, results):
    assert "Shift+Enter" in page.locator("body").inner_text()
    upload(page, PHOTO)
    write(page, EXPRESSIONS)
    page.keyboard.press("Shift+Enter")

    head, *rows = table(page)
    assert head == COLUMNS
    for row, result in zip(rows, results, strict=True):
        assert row[0] == result["text"]
        expected = [round(result["score"], 3), *(round(side, 1) for side in result["box"].values())]
        assert [float(cell) for cell in row[1:]] == pytest.approx(expected, abs=0.11)

    # Both pictures are drawn in the size of the photo.
    photo = Image.open(PHOTO)
    drawn = page.locator("img[src*='.webp']").first
    assert drawn.evaluate("image => [image.naturalWidth, image.naturalHeight]") == list(photo.size)
    assert page.locator("figcaption").all_inner_texts() == EXPRESSIONS
    for shown, result, colour in zip(maps(page), results, COLOURS, strict=False):
        expected = draw_boxes(draw_map(photo, result["map"]), [list(result["box"].values())], [""], [colour])
        assert shown.shape == (480, 480, 3) and np.abs(shown - np.asarray(expected)).mean() < 3  # JPEG

    # Nothing is cut off, or needs to be scrolled sideways.
    width = page.viewport_size["width"]
    sides = page.locator("#found, #found *").evaluate_all("all => all.map(one => one.getBoundingClientRect().right)")
    assert max(sides) <= width and page.evaluate("document.documentElement.scrollWidth") == width


def test_the_button_and_the_lowest_score(page):
    upload(page, PHOTO)
    write(page, EXPRESSIONS)
    tab_to(page, "input[type=number]")
    page.keyboard.press("Control+A")
    page.keyboard.type("0.9")
    tab_to(page, "button.primary")
    page.keyboard.press("Enter")
    assert [row[2:] for row in table(page)[1:]] == [["9.2", "63.0", "344.0", "480.0"], ["not found"]]
    assert page.locator("figure").count() == 2


def test_an_example(page):
    tab_to(page, "td")
    page.keyboard.press("Enter")
    page.get_by_label("Remove Image").wait_for()
    tab_to(page, "textarea")
    page.keyboard.press("Shift+Enter")
    assert (
        [row[0] for row in table(page)[1:]] == EXAMPLES[0][1].splitlines() == page.input_value("textarea").split("\n")
    )


def test_a_broken_file_is_named(page, tmp_path):
    (tmp_path / "not a picture.png").write_text("no image")
    upload(page, tmp_path / "not a picture.png")
    write(page, EXPRESSIONS)
    page.keyboard.press("Shift+Enter")
    page.get_by_text("not a picture.png is no image that can be read").wait_for()
    assert page.locator("#found").count() == 0
