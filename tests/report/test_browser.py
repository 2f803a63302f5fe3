"""The report in a real browser: from a file, without a network, with a keyboard, in both themes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up_run import HOSTILE

pytestmark = pytest.mark.browser

_AXE = Path(__file__).parents[1] / "browser" / "node_modules" / "axe-core" / "axe.min.js"
# It must not ask for anything on its own, or a request of the page would not be told apart.
_SWITCHES = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_ROWS = "#neuron-table tbody tr"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail(
            "There is no chromium. Install it: apt-get install --no-install-recommends chromium"
        )
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=list(_SWITCHES))
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory, page: str) -> str:
    file = tmp_path_factory.mktemp("browser") / "report.html"
    file.write_text(page, encoding="utf-8")
    return file.as_uri()


class Visit:
    """The report opened in a window, with all that the browser complained of or asked for."""

    def __init__(self, browser: Any, report: str, width: int, theme: str) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=theme, reduced_motion="reduce"
        )
        self.tab = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(report)
        self.tab.wait_for_selector(_ROWS)

    def column(self, title: str) -> list[str]:
        """What the shown rows say under ``title``."""
        titles = self.tab.locator("#neuron-table thead button").all_inner_texts()
        place = titles.index(title) + 1
        texts: list[str] = self.tab.locator(f"{_ROWS} > :nth-child({place})").all_inner_texts()
        return texts

    def status(self) -> str:
        text: str = self.tab.locator("#neuron-status").inner_text()
        return text.replace("\N{EN DASH}", "-")

    def sort(self, title: str) -> str | None:
        button = self.tab.get_by_role("button", name=title, exact=True)
        button.click()
        order: str | None = button.locator("..").get_attribute("aria-sort")
        return order

    def has_focus(self, selector: str) -> bool:
        found: bool = self.tab.locator(selector).first.evaluate(
            "it => it === document.activeElement"
        )
        return found


@pytest.fixture(params=[(1440, "light"), (390, "dark")], ids=["wide-light", "narrow-dark"])
def visit(browser: Any, report: str, request: pytest.FixtureRequest) -> Iterator[Visit]:
    made = Visit(browser, report, *request.param)
    yield made
    assert made.complaints == []
    assert [url for url in made.requests if not url.startswith("data:")] == [report]
    made.context.close()


@pytest.fixture
def wide(browser: Any, report: str) -> Iterator[Visit]:
    made = Visit(browser, report, 1440, "light")
    yield made
    assert made.complaints == []
    made.context.close()


def test_it_loads_in_silence_and_runs_no_script_of_a_model(visit: Visit) -> None:
    visit.tab.fill("#neuron-search", "<b>bold")
    # The neuron that promotes the hostile token, and whose contexts are full of it.
    visit.tab.locator(f"{_ROWS} .open").first.click()
    dialog = visit.tab.locator("#neuron-dialog")
    assert HOSTILE in dialog.locator(".chips").first.inner_text()
    assert HOSTILE in dialog.locator("mark").first.inner_text()
    assert HOSTILE in visit.tab.locator("#samples").text_content()
    assert dialog.locator("b, img, script").count() == 0
    assert visit.tab.title().startswith("NeFT on")


def test_the_page_never_scrolls_sideways(visit: Visit, tmp_path: Path) -> None:
    for summary in visit.tab.locator("summary").all():
        summary.click()
    width = visit.tab.evaluate("innerWidth")
    assert visit.tab.evaluate("document.documentElement.scrollWidth") == width
    visit.tab.locator(f"{_ROWS} .open").first.click()
    box = visit.tab.locator("#neuron-dialog").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    shot = visit.tab.screenshot(path=tmp_path / "report.png", full_page=True)
    assert len(shot) > 20_000


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("state", ["page", "dialog"])
def test_no_serious_violation_of_accessibility(
    browser: Any, report: str, theme: str, state: str
) -> None:
    if not _AXE.is_file():
        pytest.fail(f"There is no {_AXE}. Install it: npm ci --prefix tests/browser")
    visit = Visit(browser, report, 1440, theme)
    if state == "dialog":
        visit.tab.fill("#neuron-search", "<b>bold")
        visit.tab.locator(f"{_ROWS} .open").first.click()
    else:
        for summary in visit.tab.locator("summary").all():
            summary.click()
    # By the debugger, which the page's content policy does not bind.
    visit.tab.evaluate(f"() => {{ {_AXE.read_text(encoding='utf-8')} }}")
    found = visit.tab.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    visit.context.close()
    serious = [
        {"rule": violation["id"], "nodes": [node["html"][:200] for node in violation["nodes"][:3]]}
        for violation in found["violations"]
        if violation["impact"] in ("serious", "critical")
    ]
    assert not serious, json.dumps(serious, indent=2)
    assert len(found["passes"]) > 10


def test_sorting(wide: Visit) -> None:
    assert wide.sort("rank after") == "descending"
    ranks = [int(text.replace(",", "")) for text in wide.column("rank after")]
    assert ranks == sorted(ranks, reverse=True)
    assert wide.sort("rank after") == "ascending"
    lowest = [int(text.replace(",", "")) for text in wide.column("rank after")]
    assert lowest == sorted(lowest)
    assert lowest[0] < ranks[-1]
    assert wide.sort("projection") == "ascending"
    projections = wide.column("projection")
    assert projections == sorted(projections)
    assert projections[0] == "down"
    # Only one column says that it is sorted.
    assert wide.tab.locator("th[aria-sort]").count() == 1


def test_what_is_not_known_comes_last_either_way(wide: Visit) -> None:
    for order in ("ascending", "descending"):
        assert wide.sort("promoted after") == order
        assert "—" not in wide.column("promoted after")[0]


def test_every_column_sorts(wide: Visit) -> None:
    titles = wide.tab.locator("#neuron-table thead button").all_inner_texts()
    assert len(titles) == 12
    for title in titles:
        assert wide.sort(title) in ("ascending", "descending")


def test_filters_and_search(wide: Visit) -> None:
    wide.tab.select_option("#filter-layer", "2")
    wide.tab.select_option("#filter-role", "up")
    assert set(wide.column("layer")) == {"2"}
    assert set(wide.column("projection")) == {"up"}
    assert "(112 in all)" in wide.status()
    wide.tab.fill("#neuron-search", "nothing is called like this")
    assert wide.status() == "No neuron of 112 matches"
    wide.tab.get_by_role("button", name="Clear").click()
    # Waiting for a condition in the page would take the eval that its security policy forbids.
    wide.tab.locator(_ROWS).nth(49).wait_for()
    assert wide.status() == "1-50 of 112"
    wide.tab.select_option("#filter-category", label="suppressed")
    assert set(wide.column("category")) == {"suppressed"}


def test_pages(wide: Visit) -> None:
    assert wide.status() == "1-50 of 112"
    first = wide.column("index")
    seen = len(first)
    assert wide.tab.get_by_role("button", name="Previous").is_disabled()
    for status in ("51-100 of 112", "101-112 of 112"):
        wide.tab.get_by_role("button", name="Next").focus()
        wide.tab.keyboard.press("Enter")
        assert wide.status() == status
        seen += len(wide.column("index"))
    assert seen == 112
    assert wide.tab.get_by_role("button", name="Last").is_disabled()
    wide.tab.get_by_role("button", name="First").click()
    assert wide.column("index") == first


def test_a_neuron_opens_and_closes_by_keyboard(wide: Visit) -> None:
    wide.tab.locator(f"{_ROWS} .open").nth(2).focus()
    index, layer = wide.column("index")[2], wide.column("layer")[2]
    wide.tab.keyboard.press("Enter")
    dialog = wide.tab.locator("#neuron-dialog")
    assert dialog.is_visible()
    assert dialog.locator("h3").inner_text() == f"Layer {layer}, up, neuron {index}"
    assert wide.has_focus("#neuron-close")
    assert wide.column("rank before")[2] in dialog.inner_text()
    wide.tab.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert wide.has_focus(f"{_ROWS}:nth-child(3) .open")


def test_a_click_anywhere_in_a_row_opens_it(wide: Visit) -> None:
    wide.tab.locator(f"{_ROWS}:nth-child(5) td").nth(3).click()
    assert wide.tab.locator("#neuron-dialog").is_visible()
    wide.tab.locator("#neuron-close").click()
    assert wide.has_focus(f"{_ROWS}:nth-child(5) .open")


def test_the_detail_view_shows_activity_and_contexts(wide: Visit) -> None:
    wide.tab.fill("#neuron-search", "<b>bold")
    wide.tab.locator(f"{_ROWS} .open").first.click()
    captions = wide.tab.locator("#neuron-dialog caption").all_inner_texts()
    assert len(captions) == 4
    headings = wide.tab.locator("#neuron-dialog h4").all_inner_texts()
    assert "Activity" in headings
    assert [heading.rpartition(": ")[2] for heading in headings[-2:]] == [
        "base model",
        "trained model",
    ]
    assert wide.tab.locator("#neuron-dialog .contexts li").count() == 6


def test_without_scripts_the_rest_is_there(browser: Any, report: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(report)
    assert tab.locator("svg.plot").count() == 8
    assert "This table needs JavaScript" in tab.locator("#neurons").inner_text()
    context.close()
