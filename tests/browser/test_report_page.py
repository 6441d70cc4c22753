"""The report as its reader meets it: in a real browser, on large and small screens."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, cast

import pytest
from devtools import Browser
from made_runs import H100, autoencoder_evaluation, evaluation, make_run, training
from PIL import Image

from calm_dist.reports.plots import DARK, LIGHT, Palette
from calm_dist.reports.report import write_report

DESKTOP: dict[str, Any] = {"width": 1200, "height": 900}
PHONE: dict[str, Any] = {"width": 390, "height": 844}
# What a page may not do: complain, fail, or ask for anything but itself.
REPORTS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Many runs, some of them lacking something, with long names and with odd ones."""
    folder = tmp_path_factory.mktemp("runs")
    steps = range(10, 401, 10)
    runs = [
        make_run(
            folder / f"calm_{number}",
            "calm",
            [training(step, 5 - step / 100, 900 + step * number) for step in steps]
            + [evaluation(step, step / (150 + 40 * number)) for step in (100, 200, 400)],
            environment=H100,
        )
        for number in range(1, 8)
    ]
    runs.append(
        make_run(
            folder / "transformer",
            "transformer",
            [training(step, 6 - step / 200) for step in steps]
            + [evaluation(s, s / 100, cross_entropy=5 - s / 200) for s in (100, 200, 300, 400)],
            name="Transformer <of a name that is too long for the legend of a plot>",
            environment={"world_size": 4, "gpu": None},
        )
    )
    runs.append(make_run(folder / "nothing", "calm", []))
    autoencoder = make_run(
        folder / "autoencoder",
        "autoencoder",
        [training(step) for step in steps] + [autoencoder_evaluation(s) for s in (100, 200, 400)],
    )
    write_report(runs, folder / "report", autoencoder=autoencoder)
    return (folder / "report" / "index.html").as_uri()


def complaints(browser: Browser, since: int) -> list[dict[str, Any]]:
    """What the page reported or asked for; asking for itself and for what it holds is no
    network."""
    events = browser.events[since:]
    requested = [
        event
        for event in events
        if event["method"] == "Network.requestWillBeSent"
        and not event["params"]["request"]["url"].startswith("data:")
        and event["params"].get("type") != "Document"
    ]
    return requested + [event for event in events if event["method"] in REPORTS]


@pytest.mark.parametrize("screen", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_renders_without_complaint_or_network(
    browser: Browser, address: str, screen: dict[str, int], scheme: str
) -> None:
    since = len(browser.events)
    browser.show(address, **screen, scheme=scheme)
    assert (
        browser.value("document.querySelector('h1').textContent") == "Next patch against next token"
    )
    browser.value("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    # All of it: what is wider than the screen scrolls inside.
    width = browser.value("document.documentElement.scrollWidth")
    assert width <= screen["width"]
    beyond = browser.value(
        "[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, svg') &&"
        " e.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert beyond == []
    assert complaints(browser, since) == []


def test_complaints_and_requests_are_noticed(browser: Browser, tmp_path: Path) -> None:
    """Or the test above could not fail."""
    (tmp_path / "page.html").write_text(
        "<script>console.warn('careful'); null.x</script><img src='http://127.0.0.1:9/x.png'>"
    )
    since = len(browser.events)
    browser.show((tmp_path / "page.html").as_uri(), **DESKTOP)
    methods = {event["method"] for event in complaints(browser, since)}
    assert {*REPORTS[:2], "Network.requestWillBeSent"} <= methods


@pytest.mark.parametrize("screen", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_plots_are_there_whole_and_in_words(
    browser: Browser, address: str, screen: dict[str, Any]
) -> None:
    browser.show(address, **screen)
    plots = browser.value(
        """[...document.querySelectorAll("figure svg")].map((svg) => {
          const box = svg.getBoundingClientRect();
          const cut = [...svg.querySelectorAll("text")].filter((text) => {
            const own = text.getBoundingClientRect();
            return own.left < box.left - 1 || own.right > box.right + 1 ||
              own.top < box.top - 1 || own.bottom > box.bottom + 1;
          }).map((text) => text.textContent);
          const fonts = [...svg.querySelectorAll("text")].map((text) =>
            text.getBoundingClientRect().height);
          return {width: box.width, height: box.height, cut, smallest: Math.min(...fonts),
            role: svg.getAttribute("role"), words: svg.getAttribute("aria-label")};
        })"""
    )
    assert len(plots) == 10
    for plot in plots:
        assert plot["width"] > 300 and plot["height"] > 100
        assert plot["cut"] == []
        assert plot["smallest"] >= 9  # pixels of a line of text
        assert plot["role"] == "img" and len(plot["words"]) > 40
    assert "Pareto front: Transformer" in plots[0]["words"]


def column(browser: Browser, number: int) -> list[str]:
    """A column of the first table, as shown."""
    rows = "[...document.querySelectorAll('table')[0].tBodies[0].rows]"
    return browser.value(f"{rows}.map((row) => row.cells[{number}].textContent)")


def sorted_by(browser: Browser, number: int) -> str:
    head = f"document.querySelectorAll('table')[0].tHead.rows[0].cells[{number}]"
    return browser.value(f"{head}.getAttribute('aria-sort')")


def place(browser: Browser, text: str) -> tuple[int, float, float]:
    """Number and middle of the first table's head of that name."""
    return tuple(
        browser.value(
            f"""(() => {{
              const button = [...document.querySelectorAll("table")[0].querySelectorAll("button")]
                .find((b) => b.textContent === {text!r});
              button.scrollIntoView({{block: "center", inline: "center"}});
              const {{x, y, width, height}} = button.getBoundingClientRect();
              return [button.closest("th").cellIndex, x + width / 2, y + height / 2];
            }})()"""
        )
    )


@pytest.mark.parametrize("screen", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_tables_sort_by_click(browser: Browser, address: str, screen: dict[str, Any]) -> None:
    browser.show(address, **screen)
    number, x, y = place(browser, "BrierLM")
    assert sorted_by(browser, number) == "none"
    browser.click(x, y)
    rising = column(browser, number)
    scores = [float(text.split()[0]) for text in rising[:-1]]
    assert len(scores) == 8 and scores == sorted(scores) and rising[-1] == "–"
    assert sorted_by(browser, number) == "ascending"
    browser.click(x, y)
    falling = column(browser, number)
    assert falling == [*reversed(rising[:-1]), "–"]
    assert sorted_by(browser, number) == "descending"
    # Rows move as a whole, and words sort as words.
    assert column(browser, 0)[0].startswith("Transformer <")
    first, x, y = place(browser, "run")
    browser.click(x, y)
    names = column(browser, first)
    assert names == sorted(names, key=str.lower) and sorted_by(browser, number) == "none"


def test_tables_sort_by_keyboard(browser: Browser, address: str) -> None:
    browser.show(address, **DESKTOP)
    focused = "document.activeElement.matches('thead button') && document.activeElement.textContent"
    for _ in range(20):
        browser.press("Tab", 9)
        if browser.value(focused) == "parameters":
            break
    assert browser.value(focused) == "parameters"
    ring = browser.value("getComputedStyle(document.activeElement).outlineStyle")
    assert ring == "solid"
    number = place(browser, "parameters")[0]
    browser.press("Enter", 13, "\r")
    rising = column(browser, 0)
    assert sorted_by(browser, number) == "ascending"
    browser.press(" ", 32, " ")
    assert sorted_by(browser, number) == "descending"
    assert column(browser, 0) != rising and column(browser, 0)[0].startswith("calm")


def brightness(color: str) -> float:
    """Relative luminance of #rrggbb, as WCAG defines it."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((brightness(one), brightness(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("scheme", "palette"), [("light", LIGHT), ("dark", DARK)])
def test_colours_follow_the_scheme_and_are_readable(
    browser: Browser, address: str, scheme: str, palette: Palette
) -> None:
    # WCAG: 4.5 for text, 3 for what is drawn.
    for color in (palette.ink, palette.muted):
        assert contrast(color, palette.paper) >= 4.5
    for color in palette.series:
        assert contrast(color, palette.paper) >= 3
    browser.show(address, **DESKTOP, scheme=scheme)
    browser.value("document.querySelector('figure').scrollIntoView({block: 'center'})")
    image = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
    # Of an RGB image, not as many colours as it may have.
    colors = cast(list[tuple[int, tuple[int, int, int]]], image.getcolors(1 << 24))
    counted = {f"#{r:02x}{g:02x}{b:02x}": count for count, (r, g, b) in colors}
    assert counted[palette.paper] > image.width * image.height / 2
    for color in (palette.ink, palette.muted, *palette.series):
        assert counted.get(color, 0) > 10, color
