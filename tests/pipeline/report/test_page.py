"""The HTML report: complete, self-contained, true to the shards, and alive in a browser."""

import io
import json
import math
import re
import shutil
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.report.page.page import SECTIONS, _embedded, report_page
from pipeline.report.page.plots import Bar, bars, curves
from pipeline.report.page.serve import page_server
from pipeline.report.page.viewer import UNIT
from pipeline.run.records import recorded_run
from stages.contract.columns import PAD_ID, list_row, sparse_row
from stages.contract.store import Store
from tests.pipeline.report.browser import (
    CHROMIUM,
    MAX_PICTURE_BYTES,
    PICTURE,
    PICTURE_SIZE,
    opened_browser,
    take_picture,
)
from tests.tiny_run import ptafuse


@pytest.fixture(scope="module")
def page(undisturbed_run: Path, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    run = shutil.copytree(undisturbed_run, tmp_path_factory.mktemp("page") / "run")
    ptafuse("interpret", str(tiny_config), "--run", str(run))
    return report_page(Store(str(run)), max_positions=600)


@pytest.fixture(scope="module")
def viewer(page: str) -> dict:
    return json.loads(re.search(r'id="viewer-data">(.*?)</script>', page, re.DOTALL)[1])


class References(HTMLParser):
    """Every address in an attribute, and the elements that have no end."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ids: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        if values.get("id"):
            self.ids.append(values["id"])


def test_page_has_every_section_and_refers_to_nothing_outside(page: str) -> None:
    references = References(page)
    assert {section.lower() for section in SECTIONS} <= set(references.ids)
    assert all(address.startswith("#") for address in references.found), references.found
    assert not re.search(r"url\((?!#)", page)  # nor do the styles
    assert "@import" not in page
    assert len(page.encode()) < 10_000_000


def test_page_shows_the_figures_of_the_terminal_report(undisturbed_run: Path, page: str) -> None:
    shown = ptafuse("report", str(undisturbed_run)).stdout
    figures = re.findall(r"\d\.\d{4}", shown)
    assert figures
    assert all(figure in page for figure in figures)


def test_viewer_holds_what_the_shards_hold(undisturbed_run: Path, viewer: dict) -> None:
    store = Store(str(undisturbed_run))
    run = recorded_run(store)
    texts, num_compared = viewer["texts"], 0
    for document in viewer["views"][0]["documents"]:
        manifest = store.read_manifest(run.steps["align/neox"].folder, document["shard"])
        table = store.read_table(manifest.data, remake="")
        rows = {
            (doc, segment): row
            for row, (doc, segment) in enumerate(
                zip(table["doc_id"].to_pylist(), table["segment"].to_pylist(), strict=True)
            )
        }
        for segment in document["segments"]:
            row = rows[document["doc"], segment["segment"]]
            stored, exact = sparse_row(table, row), list_row(table, "exact_context", row)
            assert len(segment["tokens"]) == len(segment["positions"]) == len(stored)
            for index, position in enumerate(segment["positions"]):
                shown = position["s"][0]["r"]
                probs = np.exp(stored.logprobs[index][stored.ids[index] != PAD_ID])
                np.testing.assert_allclose(np.array(shown[1::2]) / UNIT, probs, atol=1e-3)
                assert bool(position["s"][0]["e"]) == bool(exact[index])
                if index + 1 < len(segment["tokens"]):
                    assert texts[position["g"]] == texts[segment["tokens"][index + 1]]
                num_compared += bool(shown)
    assert num_compared > 100


def test_plan_moves_the_mass_that_is_projected(viewer: dict) -> None:
    positions = [
        part
        for document in viewer["views"][0]["documents"]
        for segment in document["segments"]
        for part in segment["positions"]
        if "m" in part["s"][0]
    ]
    num_compared = 0
    for position in positions:
        source = position["s"][0]
        columns = dict(zip(source["u"], np.array(source["m"]).sum(axis=0) / UNIT, strict=True))
        for text, units in zip(source["r"][::2], source["r"][1::2], strict=True):
            if source["u"].count(text) == 1:  # two tokens may have the same text
                assert columns[text] == pytest.approx(units / UNIT, abs=6e-3)  # each entry of the plan is rounded
                num_compared += 1
    assert num_compared > 500


def test_a_text_cannot_end_the_script_that_holds_it() -> None:
    embedded = _embedded({"texts": ["</script><img src=x onerror=alert(1)>", "<!--"]})
    assert "<" not in embedded
    assert json.loads(embedded)["texts"][0].startswith("</script>")


def test_plots_take_the_page_s_colour_and_are_reproducible() -> None:
    entries = [Bar("one", 0.1, 0.02), Bar("two", -0.3, 0.01, group=1)]
    drawn = bars(entries, axis="nats")
    assert drawn == bars(entries, axis="nats")
    assert "currentColor" in drawn
    assert "two" in drawn
    unsure = bars([*entries, Bar("of one document", 0.2, math.nan)], axis="nats")
    assert "+0.2000<" in unsure or ">0.2<" in unsure
    assert "nan" not in unsure
    lines = curves({"gold": {"a": ([1, 2], [3.0, 2.0]), "b": ([1], [2.5])}}, axis="step")
    assert lines.count(">a<") == lines.count(">b<") == 1  # one legend


def test_report_writes_one_file(undisturbed_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    done = ptafuse("report", str(undisturbed_run), "--html", str(path))
    assert str(path) in done.stdout.replace("\n", "")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_run_directory_without_results_is_refused(tmp_path: Path) -> None:
    refused = ptafuse("report", str(tmp_path), "--html", str(tmp_path / "x.html"), check=False)
    assert refused.returncode == 1
    assert "no configuration has been run here" in refused.stderr


def test_the_page_is_served_on_loopback_and_rendered_at_every_load() -> None:
    counter = iter(range(10))
    with page_server(lambda: f"page {next(counter)}", port=0) as server:
        host, port = server.server_address[:2]
        assert host == "127.0.0.1"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        pages = [urllib.request.urlopen(f"http://127.0.0.1:{port}/").read().decode() for _ in range(2)]
        assert pages == ["page 0", "page 1"]
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/etc/passwd")
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    pytest.importorskip("playwright.sync_api")
    with opened_browser() as opened:
        yield opened


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 400)])
def test_page_in_a_browser(browser, page: str, tmp_path: Path, scheme: str, width: int) -> None:
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    problems: list[str] = []
    opened = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    opened.on("console", lambda message: problems.append(message.text))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda request: problems.append(request.url) if not request.url.startswith("file:") else None)
    opened.goto(path.as_uri())
    assert opened.evaluate("document.documentElement.scrollWidth") <= width  # nothing but tables scrolls sideways
    assert opened.locator("#interpretation svg").count() == 3
    opened.locator("#interpretation summary").focus()
    assert opened.locator("#interpretation details table").is_visible()
    opened.keyboard.press("Enter")
    assert not opened.locator("#interpretation details table").is_visible()
    tokens = opened.locator("#document .token")
    for index in range(tokens.count()):
        tokens.nth(index).click()
        if opened.locator(".plan").count():
            break
    assert opened.locator(".plan caption").inner_text().startswith("transport plan, % of mass: neox down, llama across")
    assert opened.locator(".lists section").count() == 4
    before = opened.locator("#details h3").first.inner_text()
    opened.keyboard.press("ArrowRight")
    assert opened.locator("#details h3").first.inner_text() != before
    opened.locator("#colour").select_option("token")
    assert "by-token" in (opened.locator("#document").get_attribute("class") or "")
    opened.locator("#doc").select_option(index=1)
    assert tokens.count() > 0
    assert not problems


@pytest.mark.slow
def test_picture_of_the_page_shows_an_opened_token(browser, page: str, tmp_path: Path) -> None:
    picture = Image.open(io.BytesIO(take_picture(browser, page, tmp_path)))
    assert picture.size == PICTURE_SIZE
    colours = picture.convert("RGB").getcolors(maxcolors=256)
    assert colours is not None
    assert len(colours) > 16  # bars, text and the plan's heat: an empty page has fewer


def test_picture_in_the_documentation_is_small_and_whole() -> None:
    assert PICTURE.stat().st_size < MAX_PICTURE_BYTES
    assert Image.open(PICTURE).size == PICTURE_SIZE
