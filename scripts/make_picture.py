"""Draw docs/images/study.png from the receipts of a study, in headless Chromium (needs the test tools).

python scripts/make_picture.py receipts/study docs/images/study.png
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from scrimp.report import find_receipts
from scrimp.report.plots import quality_against_cost, training_curves

WIDTH, HEIGHT = 1200, 430


def main(folder: str, picture: str) -> None:
    receipts = find_receipts([folder])
    figures = [quality_against_cost(receipts), training_curves(receipts)]
    for button, figure in enumerate(figures):
        figure.plotly_update(*figure.layout.updatemenus[0].buttons[button].args)  # FLOPs across, in both
        figure.layout.updatemenus = ()
    draw(figures, Path(picture))


def draw(figures: Sequence[Figure], picture: Path) -> None:
    """Write figures side by side as one PNG."""
    panels = []
    for figure in figures:
        figure.update_layout(width=WIDTH // 2 - 10, height=HEIGHT - 10, template="plotly_white")
        panels.append(figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False}))
    style = "body{margin:0;background:#fff;display:flex;gap:10px;width:max-content}"
    page = f"<meta charset=utf-8><style>{style}</style><script>{get_plotlyjs()}</script>{''.join(panels)}"
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "page.html"
        file.write_text(page, encoding="utf-8")
        shoot(file, picture, Path(scratch))


def shoot(page: Path, picture: Path, scratch: Path) -> None:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                 "--hide-scrollbars"):  # fmt: skip
        options.add_argument(flag)
    options.add_argument(f"--window-size={WIDTH},{HEIGHT + 140}")
    options.add_argument(f"--user-data-dir={scratch / 'profile'}")
    browser = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        browser.get(page.as_uri())
        time.sleep(3)  # let the plots settle
        browser.set_window_size(WIDTH, HEIGHT + (HEIGHT - browser.execute_script("return innerHeight")) + 140)
        picture.parent.mkdir(parents=True, exist_ok=True)
        browser.find_element("tag name", "body").screenshot(str(picture))
    finally:
        browser.quit()


if __name__ == "__main__":
    main(*sys.argv[1:3])
