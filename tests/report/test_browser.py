"""The page in a real browser: what a reader sees, clicks, types and hears."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from planted_runs import evaluation, hostile_runs, plant, whole_run
from reading_pages import SECTIONS, Element, read

from cure.report.page import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
pytest.importorskip("selenium.webdriver.support.ui")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None,
    reason="chromium and chromedriver are not installed (Debian: chromium, chromium-driver)",
)

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--no-default-browser-check", "--disable-dev-shm-usage"),
)
WIDE, PHONE = 1280, 360


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser with a profile of its own that keeps a log of messages and of requests."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one of them with its start."""
    place = tmp_path_factory.mktemp("browsed")
    runs = [
        whole_run(place),
        plant(place / "other", method="at", results=[evaluation("other", 120, method="at")]),
    ]
    return write_report(runs, output=place / "page.html")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs whose every name means harm."""
    place = tmp_path_factory.mktemp("hostile")
    runs = hostile_runs(place)
    title = "</title><script>window.hurt=1</script>" + "wide" * 60
    return write_report(runs, output=place / "page.html", title=title)


def show(browser: Any, page: Path, width: int = WIDE, dark: bool = False) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    still = {"name": "prefers-reduced-motion", "value": "reduce"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme, still]})
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page.as_uri())


def requests(browser: Any) -> set[str]:
    """Addresses that were asked for since the page was opened."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return {params["request"]["url"].split("#")[0] for params in sent}


def press(browser: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def test_nothing_is_wrong_and_nothing_leaves_the_page(browser: Any, page: Path) -> None:
    show(browser, page)
    assert browser.title == "robust, other · cure report"
    assert browser.get_log("browser") == []
    outside = {url for url in requests(browser) if not url.startswith("data:")}
    assert outside == {page.as_uri()}
    names = browser.execute_script("return performance.getEntriesByType('resource').map(e=>e.name)")
    assert [name for name in names if not name.startswith("data:")] == []


def test_every_figure_is_shown(browser: Any, page: Path) -> None:
    show(browser, page)
    sizes = browser.execute_script(
        "return [...document.images].map((image) => [image.complete, image.naturalWidth])"
    )
    assert len(sizes) >= 8
    assert all(complete and width > 200 for complete, width in sizes)


def test_its_policy_stops_what_would_leave_it(browser: Any, page: Path) -> None:
    show(browser, page)
    reached = browser.execute_async_script("""
        const done = arguments[0];
        fetch("http://127.0.0.1:9/").then(() => done("sent"), () => done("stopped"));
    """)
    assert reached == "stopped"
    script = "const s = document.createElement('script'); s.text = 'window.hurt = 1';"
    browser.execute_script(script + "document.body.append(s)")
    assert browser.execute_script("return window.hurt") is None
    said = " ".join(entry["message"] for entry in browser.get_log("browser"))
    assert "Content Security Policy" in said


def test_every_link_of_the_contents_lands_on_its_section(browser: Any, page: Path) -> None:
    show(browser, page)
    for name in SECTIONS:
        browser.find_element("css selector", f"nav a[href='#{name}']").click()
        top, bottom, height, end = browser.execute_script(
            """const box = document.getElementById(arguments[0]).getBoundingClientRect();
            return [box.top, box.bottom, innerHeight,
                    scrollY + innerHeight >= document.documentElement.scrollHeight - 1];""",
            name,
        )
        # The last sections are too short to reach the top of the window.
        assert -1 <= top <= 60 or (end and top < height and bottom > 0), name


def test_a_link_to_what_is_folded_unfolds_it(browser: Any, page: Path) -> None:
    show(browser, page)
    card = browser.find_element("id", "trained-3")
    assert card.get_attribute("open") is None
    browser.find_element("css selector", "nav a[href='#trained-3']").click()
    # The event that unfolds it comes after the click.
    webdriver.support.ui.WebDriverWait(browser, 5).until(lambda _: card.get_attribute("open"))


def column(browser: Any, number: int) -> list[str]:
    return browser.execute_script(
        """return [...document.querySelector('#accuracies table').tBodies[0].rows]
        .map(row => row.cells[arguments[0]].innerText.trim().split(/\\s/)[0])""",
        number,
    )


def test_columns_sort_by_mouse_and_keyboard_and_say_so(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    show(browser, page)
    heads = browser.find_elements("css selector", "#accuracies table:first-of-type thead th")
    natural = heads[2]
    assert column(browser, 2) == ["75.0", "95.0", "60.0"]
    natural.find_element("tag name", "button").click()
    assert column(browser, 2) == ["95.0", "75.0", "60.0"]
    assert natural.get_attribute("aria-sort") == "descending"
    status = browser.find_element("id", "announce")
    assert status.get_attribute("textContent") == "Sorted by natural, descending"
    press(browser, Keys.ENTER)
    assert column(browser, 2) == ["60.0", "75.0", "95.0"]
    assert status.get_attribute("textContent") == "Sorted by natural, ascending"
    button = heads[1].find_element("tag name", "button")
    browser.execute_script("arguments[0].focus()", button)
    press(browser, Keys.SPACE)
    assert column(browser, 1) == ["at", "cure", "natural"]
    assert natural.get_attribute("aria-sort") == "none"
    # The bar of a row stays with it.
    assert column(browser, 2) == ["60.0", "75.0", "95.0"]


def test_the_keyboard_reaches_everything(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    show(browser, page)
    now = "return [document.activeElement.className, document.activeElement.innerText]"
    press(browser, Keys.TAB)
    assert browser.execute_script(now)[0] == "skip"
    shown = browser.execute_script("return document.activeElement.getBoundingClientRect().top")
    assert shown >= 0
    press(browser, Keys.ENTER)
    assert browser.current_url.endswith("#verdict")
    seen = []
    for _ in range(120):
        press(browser, Keys.TAB)
        name, text = browser.execute_script(now)
        seen.append(name)
        outline = "return getComputedStyle(document.activeElement).outlineStyle"
        assert browser.execute_script(outline) != "none", (name, text)
        if name == "sort":
            break
    assert "sort" in seen


def test_colours_follow_the_system_and_the_button(browser: Any, page: Path) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    show(browser, page, dark=True)
    browser.execute_script("localStorage.clear()")
    show(browser, page, dark=True)
    dark = browser.execute_script(ground)
    button = browser.find_element("id", "theme")
    assert button.text == "Light"
    assert button.get_attribute("aria-label") == "Change to light colours"
    button.click()
    light = browser.execute_script(ground)
    assert light != dark
    assert button.text == "Dark"
    # Figures are drawn in dark ink on a ground of their own, whatever the colours of the page.
    under = "return getComputedStyle(document.querySelector('#learning img')).backgroundColor"
    assert browser.execute_script(under) == "rgb(255, 255, 255)"
    show(browser, page)
    browser.execute_script("localStorage.clear()")
    show(browser, page)
    assert browser.execute_script(ground) == light


CONTRAST = """
const luminance = (rgb) => {
  const parts = rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
};
const numbers = (colour) => {
  const context = document.createElement("canvas").getContext("2d");
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  const data = [...context.getImageData(0, 0, 1, 1).data];
  return [...data.slice(0, 3), data[3] / 255];
};
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = numbers(getComputedStyle(at).backgroundColor);
    if (colour[3] > 0.99) return colour;
  }
  return [255, 255, 255, 1];
};
const low = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  const style = getComputedStyle(element);
  if (!own || element.closest(".hidden, script, style, [hidden]")) continue;
  if (!element.checkVisibility()) continue;
  const ink = numbers(style.color);
  const ground = behind(element);
  const [a, b] = [luminance(ink), luminance(ground)].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) low.push([element.tagName, element.className.baseVal ?? element.className,
                             element.textContent.slice(0, 30), ratio]);
}
return low;
"""


@pytest.mark.parametrize("dark", [False, True])
def test_words_stand_out_from_their_ground(browser: Any, page: Path, dark: bool) -> None:
    show(browser, page, dark=dark)
    unfold = "document.querySelectorAll('details').forEach(d => d.open = true)"
    browser.execute_script(unfold)
    assert browser.execute_script(CONTRAST) == []


@pytest.mark.parametrize("which", ["page", "hostile"])
@pytest.mark.parametrize("width", [PHONE, WIDE])
def test_the_page_never_scrolls_sideways(
    browser: Any, which: str, width: int, request: pytest.FixtureRequest
) -> None:
    show(browser, request.getfixturevalue(which), width)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    over = browser.execute_script("""
        const wide = document.documentElement.clientWidth;
        return [...document.querySelectorAll("body *")].filter((element) => {
          const box = element.parentElement.closest(".box, .picture, pre, nav");
          return !box && element.getBoundingClientRect().right > wide + 1;
        }).map((element) => element.outerHTML.slice(0, 120));""")
    assert over == []
    inner = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scrolled, shown = browser.execute_script(inner)
    assert scrolled <= shown
    assert shown <= width


def test_names_that_mean_harm_do_nothing(browser: Any, hostile: Path) -> None:
    show(browser, hostile)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    for button in browser.find_elements("css selector", "#accuracies .sort")[:3]:
        browser.execute_script("arguments[0].click()", button)
    assert browser.execute_script("return window.hurt") is None
    assert browser.get_log("browser") == []
    assert {u for u in requests(browser) if not u.startswith("data:")} == {hostile.as_uri()}
    assert browser.execute_script("return getComputedStyle(document.body).display") == "block"
    assert browser.execute_script("return document.querySelectorAll('script').length") == 1
    assert r"$\frac$ _x" in browser.find_element("css selector", "nav .legend").text


def test_what_a_screen_reader_needs_is_there(browser: Any, page: Path) -> None:
    show(browser, page)
    faults = browser.execute_script("""
        const faults = [];
        const said = (id) => document.getElementById(id)?.textContent.trim();
        const named = (e) => e.getAttribute("aria-label") || e.textContent.trim()
          || (e.getAttribute("aria-labelledby") || "").split(" ").every(said);
        const speaking = "a, button, summary, section, nav, [role=region], [role=img]";
        for (const e of document.querySelectorAll(speaking))
          if (!named(e)) faults.push(e.outerHTML.slice(0, 100));
        for (const e of document.querySelectorAll("[aria-labelledby]"))
          for (const id of e.getAttribute("aria-labelledby").split(" "))
            if (!document.getElementById(id)) faults.push("no " + id);
        for (const e of document.querySelectorAll("svg:not([role=img])"))
          if (e.getAttribute("aria-hidden") !== "true") faults.push(e.outerHTML.slice(0, 100));
        for (const e of document.querySelectorAll("table"))
          if (!e.caption || [...e.tHead.querySelectorAll("th")].some(th => th.scope !== "col"))
            faults.push(e.outerHTML.slice(0, 100));
        let level = 0;
        for (const e of document.querySelectorAll("h1, h2, h3, h4")) {
          const now = Number(e.tagName[1]);
          if (now > level + 1) faults.push("from h" + level + " to " + e.outerHTML.slice(0, 100));
          level = now;
        }
        for (const name of ["main", "nav", "header", "h1"])
          if (document.querySelectorAll(name).length !== 1) faults.push(name);
        if (document.documentElement.lang !== "en") faults.push("lang");
        return faults;""")
    assert faults == []
    small = browser.execute_script("""
        return [...document.querySelectorAll("button, nav a")].map((e) => e.getBoundingClientRect())
          .filter((box) => box.height && box.height < 24).length;""")
    assert small == 0


def test_paper_shows_everything_and_no_buttons(browser: Any, page: Path) -> None:
    show(browser, page)
    made = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
    assert base64.b64decode(made["data"]).startswith(b"%PDF")
    assert browser.execute_script(
        "return [...document.querySelectorAll('details')].every((folded) => folded.open)"
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown = browser.execute_script(
        "return ['nav', '#theme', '.skip'].map((name) => document.querySelector(name))"
        ".map((element) => getComputedStyle(element).display)"
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert shown == ["none", "none", "none"]


def test_without_scripts_everything_is_there(browser: Any, page: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(browser, page)
        text = browser.find_element("css selector", "#accuracies table").text
        assert "75.0" in text
        assert browser.find_element("id", "glossary").is_displayed()
        assert not browser.find_element("id", "theme").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    tree: Element = read(page)
    assert len(tree.all("button")) == 1
