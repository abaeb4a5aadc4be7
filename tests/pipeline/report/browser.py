"""Chromium for the tests of the report page, and the picture of the page in the documentation.

``python -m tests.pipeline.report.browser RUN`` writes ``docs/images/report.png`` from a finished run, e.g. the demo's.
"""

import io
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from PIL import Image

from pipeline.report.page.page import report_page
from stages.contract.store import Store

REPOSITORY: Final = Path(__file__).parents[3]
PICTURE: Final = REPOSITORY / "docs" / "images" / "report.png"
MAX_PICTURE_BYTES: Final = 300_000
PICTURE_SIZE: Final = (1280, 1180)
FIRST_TOKEN: Final = 10
"""At the start of a text no model knows much."""
MIN_MOVED_CELLS: Final = 16
"""A plan with fewer cells that hold mass shows little."""

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS: Final = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def opened_browser() -> Iterator[Any]:
    """Start the installed Chromium; the caller checks ``CHROMIUM`` first."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


def take_picture(browser: Any, html: str, folder: Path) -> bytes:
    """Return a PNG of the page's document viewer with one token opened.

    Args:
        browser: from ``opened_browser``.
        html: the report page.
        folder: where the page is written, for the browser to open.
    """
    file = folder / "picture.html"
    file.write_text(html, encoding="utf-8")
    width, height = PICTURE_SIZE
    page = browser.new_page(color_scheme="light", viewport={"width": width, "height": height})
    page.goto(file.as_uri())
    tokens = page.locator("#document .token")
    for index in range(min(FIRST_TOKEN, tokens.count() - 1), min(tokens.count(), 200)):
        tokens.nth(index).click()
        if _num_moved_cells(page) >= MIN_MOVED_CELLS:
            break
    page.mouse.move(0, 0)  # nothing is hovered over
    page.evaluate("document.getElementById('documents').scrollIntoView()")
    image = Image.open(io.BytesIO(page.screenshot()))
    page.close()
    written = io.BytesIO()
    # Text on a plain background: 64 colours look the same and take a third of the bytes.
    image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(written, "PNG", optimize=True)
    return written.getvalue()


def _num_moved_cells(page: Any) -> int:
    """Count the cells of the opened transport plan that hold mass; 0 where no plan is open."""
    return sum(bool(text.strip(" ·0.")) for text in page.locator(".plan tbody td").all_inner_texts())


def main() -> None:
    """Write the picture of the documentation from the run directory that the command line names."""
    if CHROMIUM is None:
        sys.exit("no Chromium on this machine: install the package `chromium`")
    import tempfile

    html = report_page(Store(sys.argv[1]))
    with opened_browser() as browser, tempfile.TemporaryDirectory() as folder:
        picture = take_picture(browser, html, Path(folder))
    if len(picture) > MAX_PICTURE_BYTES:
        sys.exit(f"the picture has {len(picture)} bytes, more than {MAX_PICTURE_BYTES}: lower its size or its colours")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_bytes(picture)
    print(f"{PICTURE}: {len(picture):,} bytes")


if __name__ == "__main__":
    main()
