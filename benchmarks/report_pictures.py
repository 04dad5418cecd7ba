"""Takes the pictures of a report in docs/, by Debian's chromium (`apt-get install chromium chromium-driver`).

    python examples/train_longshort.py --training.rounds "long short long" --training.steps 12 \\
        --training.evaluate-every 4 --training.keep-episodes 1 --test-problems 120 --output runs/longshort
    python benchmarks/report_pictures.py runs/longshort

Shows the figures over the steps, and a wrong dialogue beside a right one of its group, by the advantage of each token.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from turnwise.analysis.report import write_report

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
# Of the dialogues that are wrong while another of their group is right, the first with the most turns.
OPEN = """
const { episodes } = page, { data } = episodes, { outcome, turns } = data.episodes;
const told = (at) => outcome[at] === 1 && data.outcome(episodes.partner(at)) === "right";
const wrong = outcome.flatMap((_, at) => (told(at) ? [at] : []));
episodes.select(wrong.reduce((best, at) => (turns[at] > turns[best] ? at : best), wrong[0]));
Object.assign(episodes.look, { tokens: true, colouring: "advantage" });
episodes.compare();
"""


def main(run: Path, docs: Path = Path(__file__).parents[1] / "docs") -> None:
    """Writes both pictures."""
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch, "report.html")
        write_report([run], page)
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for flag in (*FLAGS, f"--user-data-dir={scratch}/profile"):
            options.add_argument(flag)
        with webdriver.Chrome(options, Service(shutil.which("chromedriver"))) as browser:
            for part, name, scheme in (("metrics", "metrics", "dark"), ("conversations", "conversation", "light")):
                metrics = {"width": 1280, "height": 820, "deviceScaleFactor": 1, "mobile": False}
                browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
                media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
                browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
                browser.get(f"{page.as_uri()}#{part}")
                browser.refresh()
                wait = WebDriverWait(browser, 60)
                wait.until(lambda found: found.find_elements(By.CSS_SELECTOR, "html[data-ready]"))
                if part == "conversations":
                    browser.execute_script(OPEN)
                    wait.until(lambda found: len(found.find_elements(By.CSS_SELECTOR, ".conversation .tokens")) > 2)
                browser.save_screenshot(str(docs / f"report_{name}.png"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
