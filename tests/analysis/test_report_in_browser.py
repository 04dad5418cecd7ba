"""The report in a real browser: Debian's chromium, without a network. `apt-get install chromium chromium-driver`."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from turnwise.analysis.report import write_report
from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript
from turnwise.rl.episode_store import EpisodeStore

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs a browser: apt-get install chromium chromium-driver"
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900",
)  # fmt: skip
PATIENCE = 30  # seconds, on a machine with other work

Open = Callable[[Path], webdriver.Chrome]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: webdriver.Chrome) -> Iterator[Open]:
    """Opens a report from disk. In the end, nothing may have been said on the console or asked of a network."""
    pages = []

    def open_page(page: Path) -> webdriver.Chrome:
        browser.get("about:blank")
        for log in ("browser", "performance"):
            browser.get_log(log)
        pages.append(page.as_uri())
        browser.get(page.as_uri())
        until(lambda: browser.execute_script("return document.documentElement.dataset.ready"))
        return browser

    yield open_page
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert pages
    assert {url.partition("#")[0] for url in asked} <= set(pages)


def until(condition: Callable[[], object]) -> object:
    """What the condition comes to, once it comes to something."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def press(browser: webdriver.Chrome, *keys: str) -> None:
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def all_of(browser: webdriver.Chrome, selector: str) -> list[WebElement]:
    return browser.find_elements(By.CSS_SELECTOR, selector)


def texts(browser: webdriver.Chrome, selector: str) -> list[str]:
    """The texts of all elements that are there at this moment."""
    script = "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)"
    return list(browser.execute_script(script, selector))


def told(browser: webdriver.Chrome, beginning: str) -> None:
    until(lambda: texts(browser, ".told")[0].startswith(beginning) and "reading" not in texts(browser, ".told")[0])


def conversations(browser: webdriver.Chrome, *ids: str) -> None:
    until(lambda: texts(browser, ".conversation h2") == list(ids))


@pytest.fixture(scope="module")
def page(training_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report([training_run], path)
    return path


def test_tables_plots_and_the_graph(opened: Open, page: Path) -> None:
    browser = opened(page)
    assert browser.title == "trained · turnwise report"
    row = texts(browser, "section:first-of-type tbody tr td")
    assert row[:2] == ["trained", "4"]
    assert row[2].startswith("50.0%")
    assert row[-1] == ""
    assert all_of(browser, ".outcomes")[0].get_attribute("title") == "2 right, 1 wrong, 1 unparsable, 1 failed"
    assert "“overthink”" in texts(browser, "th")
    press(browser, "2")
    assert texts(browser, ".part:not([hidden]) figcaption strong") == ["evaluation/right", "right"]
    assert texts(browser, ".part:not([hidden]) .reading") == ["step 050.0%", "step 275%"]
    assert len(all_of(browser, "polyline")) == 2
    names = browser.execute_script("return [...document.querySelectorAll('svg.plot')].map((one) => one.ariaLabel)")
    assert names[2:] == ["evaluation/right over training steps", "right over training steps"]
    press(browser, "4")
    assert set(texts(browser, ".state text:first-of-type")) == {"start", "think", "answer", "end", "failed"}
    assert "</rethink>20% · 1" in texts(browser, ".edge-label")
    assert "think to answer, 5 times\n</think>: 5" in texts(browser, ".edge title")


def test_search_and_filters(opened: Open, page: Path) -> None:
    browser = opened(page)
    press(browser, "3")
    told(browser, "5 of 5 · 50.0% right")
    assert len(all_of(browser, ".row")) == 5
    for chip, found in (("outcome-wrong", "1 of 5 · 0.0%"), ("outcome-failed", "2 of 5"), ("outcome-wrong", "1 of 5")):
        browser.execute_script("document.getElementById(arguments[0]).click()", chip)
        told(browser, found)
    browser.execute_script("document.getElementById('outcome-failed').click()")
    for chip in ("rethink", "aha", "long"):
        browser.execute_script("document.getElementById(arguments[0]).click()", chip)
        told(browser, "1 of 5 · 100.0%")
        browser.execute_script("document.getElementById(arguments[0]).click()", chip)
    choose = "const one = document.getElementById(arguments[0]); one.value = arguments[1]; "
    choose += "one.dispatchEvent(new Event('change'))"
    browser.execute_script(choose, "level", "3")
    told(browser, "3 of 5")
    browser.execute_script(choose, "step", "2")
    told(browser, "2 of 5")
    browser.execute_script(choose, "level", "")
    browser.execute_script(choose, "step", "")
    press(browser, "/")
    press(browser, "AM I OVER")
    told(browser, "1 of 5 · 100.0%")
    press(browser, Keys.ESCAPE, "j")
    conversations(browser, "hard#0")
    assert texts(browser, ".conversation mark") == ["am I over"]
    press(browser, "/", Keys.CONTROL + "a")
    press(browser, "/boxed.[67]/")
    told(browser, "4 of 5")
    press(browser, Keys.CONTROL + "a", "/(/")
    until(lambda: texts(browser, ".told")[0].startswith("Not a regular expression"))


def test_tokens_by_log_probability_mask_and_advantage(opened: Open, page: Path) -> None:
    browser = opened(page)
    press(browser, "3", "j", "j", "j", "j")
    conversations(browser, "hard#0")
    assert "right" in texts(browser, ".row[aria-selected=true] .outcome")
    browser.execute_script("document.getElementById('tokens').focus()")
    press(browser, Keys.SPACE)
    until(lambda: texts(browser, ".turn:nth-of-type(3) .token.trained"))
    assert browser.execute_script("return document.activeElement.id") == "tokens", "which was drawn anew"
    think, answer, again, _ = ("".join(texts(browser, f".turn:nth-of-type({n}) .token")) for n in (1, 2, 3, 4))
    assert (think, answer) == ("<think>7×8=50, or am I overthinking?</think>", "<answer> is it?</rethink>")
    assert again == "<think>7×8=56</think>"
    assert not all_of(browser, ".turn:nth-of-type(2) .token.trained"), "the short seat was not trained"
    browser.execute_script("document.querySelector('.turn:nth-of-type(3) .token').focus()")
    first = texts(browser, "#token-line")[0]
    assert first == '"<think>"id 5log-probability −0.5000probability 60.65%mask trainedadvantage +0.2500'
    press(browser, Keys.ARROW_RIGHT)
    assert texts(browser, "#token-line")[0].startswith('"7"id ')
    press(browser, "r")
    until(lambda: texts(browser, ".turn:nth-of-type(3) .token.read-only"))
    assert "".join(texts(browser, ".turn:nth-of-type(3) .token.read-only")) == "<answer> is it?</rethink>"
    browser.execute_script("document.querySelector('.turn:nth-of-type(3) .token').focus()")
    assert texts(browser, "#token-line")[0] == '"<answer>"id 7mask only read'
    seen = []
    for _ in range(3):
        seen.append(browser.execute_script("return document.querySelector('.tokens').className"))
        press(browser, "v")
        until(lambda: browser.execute_script("return document.querySelector('.tokens').className") != seen[-1])
        assert browser.execute_script("return document.activeElement.token.id") == 7, "the focused one, drawn anew"
        assert texts(browser, "#token-line")[0] == '"<answer>"id 7mask only read'
    assert seen == ["tokens by-probability", "tokens by-advantage", "tokens by-mask"]
    press(browser, "t")
    until(lambda: not all_of(browser, ".token"))
    assert browser.execute_script("return document.activeElement.id") == "pane", "which scrolls by the arrow keys"


def test_two_samples_of_a_problem_side_by_side(opened: Open, page: Path) -> None:
    browser = opened(page)
    press(browser, "3", "j", "j", "j", "j")
    conversations(browser, "hard#0")
    press(browser, "c")
    conversations(browser, "hard#0", "hard#1")
    left, right = all_of(browser, ".conversation")
    assert left.location["y"] == right.location["y"]
    assert left.location["x"] < right.location["x"]
    assert texts(browser, ".conversation:first-child .rewards td") == ["long", "+1.000", "+0.500", "+1.500"]
    assert texts(browser, ".conversation .advantage") == ["advantage +0.250"] * 2 + ["advantage −0.250"]
    assert browser.current_url.endswith("#conversations/3/4")
    press(browser, "]")
    conversations(browser, "hard#0", "hard#0")
    assert "failed" in texts(browser, ".conversation .badge"), "of step 1: elsewhere, and not of the group"
    browser.get(browser.current_url)
    browser.refresh()
    conversations(browser, "hard#0", "hard#0")
    press(browser, Keys.ESCAPE)
    conversations(browser, "hard#0")
    press(browser, "k")
    conversations(browser, "hard#0")
    press(browser, "k", "k")
    conversations(browser, "easy#0")
    press(browser, "?")
    assert until(lambda: all_of(browser, "dialog[open] button"))
    press(browser, Keys.ENTER)  # its button has the focus
    until(lambda: not all_of(browser, "dialog[open]"))


def test_light_and_dark_and_narrow(opened: Open, page: Path) -> None:
    browser = opened(page)
    shades = {}
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        shades[scheme] = sum(map(int, re.findall(r"\d+", colour)))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert shades["light"] > 600 > 200 > shades["dark"]
    metrics = {"width": 420, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for key in "1234":
        press(browser, key)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 420
    press(browser, "3", "j")
    until(lambda: all_of(browser, ".conversation"))
    assert not all_of(browser, "#list")[0].is_displayed()
    browser.find_element(By.CSS_SELECTOR, ".back").click()
    until(lambda: all_of(browser, "#list")[0].is_displayed())
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


HOSTILE = (
    "</script><script>document.title = 'hit'</script>",
    "<img src=http://127.0.0.1:9/x onerror=\"document.title='hit'\">",
    "\u202egnp.exe\u202c and \u2066isolated\u2069, \u200f, \ufeff, \x1b[31m, \x00",
    "$\\frac{1}{2}$ \\(x<y\\) ${document.title='hit'}",
    "<!-- <![CDATA[ ]]> --> &lt;b&gt; &amp; {{7*7}}",
    "l" * 1_000_000,
)


def test_hostile_text_is_text(opened: Open, tmp_path: Path) -> None:
    with EpisodeStore(tmp_path / HOSTILE[3], {"protocol": HOSTILE[0]}) as store:
        for sample, text in enumerate(HOSTILE):
            problem = Problem(HOSTILE[0], HOSTILE[2] + HOSTILE[0], HOSTILE[1], subject=HOSTILE[4])
            step = Step(HOSTILE[1], HOSTILE[0], Reply(text, 1, "stop", HOSTILE[0], model=HOSTILE[4]), HOSTILE[3])
            store.append(Episode(Transcript(problem, (step,)), sample, 0, Grade(Outcome.WRONG, text)))
    broken = tmp_path / "broken.jsonl"
    line = (store.folder / "episodes.jsonl").read_bytes().splitlines()[4]
    broken.write_bytes(line.replace(b"<!--", b"\xff\xc0<!--").replace(b"{{7*7}}", rb"\ud800") + b"\n")
    with EpisodeStore(tmp_path / "chats", {"protocol": "chat log"}) as chats:
        chats.append(Episode(Transcript(Problem("chat", "Well?", ""), (Step("a", "a", Reply(HOSTILE[0], 1)),)), 0, 0))
    write_report([store.folder, broken, chats.folder], tmp_path / "report.html")
    browser = opened(tmp_path / "report.html")
    for key in "1243":
        press(browser, key)
    assert texts(browser, "section:first-of-type tbody tr:last-child td")[:3] == ["chats", "1", ""]
    told(browser, "8 of 8 · 0.0% right")
    browser.execute_script("document.getElementById('long').click()")  # all are as long as the longest tenth
    told(browser, "8 of 8")
    for number in (0, 1, 3, 4):
        browser.execute_script("page.episodes.select(arguments[0])", number)
        until(lambda number=number: texts(browser, ".turn .said") == [HOSTILE[3] + HOSTILE[number]])
    browser.execute_script("page.episodes.select(2)")
    until(lambda: texts(browser, ".turn .unseen"))
    assert texts(browser, ".turn .said .unseen") == ["RLO", "PDF", "LRI", "PDI", "RLM", "BOM", "U+001B", "U+0000"]
    browser.execute_script("page.episodes.select(5)")
    until(lambda: texts(browser, ".turn .said button") == ["… show all 1,000,000 characters"])
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 1280
    browser.find_element(By.CSS_SELECTOR, ".turn .said button").click()
    until(lambda: len(texts(browser, ".turn .said")[0]) > 1_000_000)
    browser.execute_script("page.episodes.select(6)")
    until(lambda: "\ufffd\ufffd<!--" in "".join(texts(browser, ".turn .said")))
    assert texts(browser, ".turn .said")[0].endswith("\ufffd")
    press(browser, "/", "DOCUMENT.TITLE")
    told(browser, "8 of 8")
    assert browser.title.endswith("turnwise report")
    assert not all_of(browser, "img")


def test_ten_thousand_episodes_are_quick(opened: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with EpisodeStore(tmp_path / "large", {"protocol": "by hand"}) as store:
        for number in range(10_000):
            problem = Problem(f"p{number // 8}", f"What is {number // 8} + 1? " + "So it is asked. " * 5, "2")
            said = [f"step {n} of {number}: " + "thinking goes on " * 12 for n in range(4)]
            logs = tuple(-0.001 * (n * number % 977) for n in range(60))
            steps = [
                Step(("long", "short")[n % 2], "think", Reply(text, 60, "end", None, tuple(range(60)), logs, (1, 2, n)))
                for n, text in enumerate(said)
            ]
            grade = Grade(Outcome.WRONG if number % 5 == 0 else Outcome.RIGHT, "2")
            store.append(Episode(Transcript(problem, tuple(steps)), number % 8, 0, grade))
    write_report([tmp_path / "large"], tmp_path / "report.html")
    start = time.monotonic()
    browser = opened(tmp_path / "report.html")
    press(browser, "3", "j")
    conversations(browser, "p0#0")
    first = time.monotonic() - start
    told(browser, "10,000 of 10,000 · 80.0% right")
    assert len(all_of(browser, ".row")) < 60, "only those in view are drawn"
    press(browser, "/", "step 3 of 9998:")
    told(browser, "1 of 10,000")
    with capsys.disabled():
        size = (tmp_path / "report.html").stat().st_size / 1e6
        print(f"\n10,000 episodes, {size:.1f} MB: a conversation is open {first:.1f} s after the report")
    assert first < 20
