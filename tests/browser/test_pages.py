"""Every page fits screens of three widths, in light and dark, and passes an accessibility checker."""

from pathlib import Path
from typing import Any

import pytest
from test_inspect import browser, site  # without selenium, this skips the module

axe = pytest.importorskip("axe_selenium_python", reason="the environment `browser` has axe")

__all__ = ["browser", "site"]  # the fixtures

WIDTHS = (390, 768, 1280)
TOO_WIDE = """
const inside = "pre, svg, .table-wrapper, .highlight";
return [...document.querySelectorAll("article *")]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(inside))
  .map(e => e.outerHTML.slice(0, 100));
"""
# Sphinx's lists of parameters, and the identifiers of tables that a directive of ours includes, break two rules.
OPTIONS = """{runOnly: ["wcag2a", "wcag2aa"], rules: {
  "definition-list": {enabled: false}, "duplicate-id-active": {enabled: false}}}"""


def pages(folder: Path) -> list[str]:
    """List the pages of the site, but for the indexes that Sphinx adds."""
    found = {page.relative_to(folder).as_posix() for page in folder.rglob("*.html")}
    assert "index.html" in found
    return sorted(
        page for page in found - {"genindex.html", "search.html"} if not page.startswith("_")
    )


def test_no_page_scrolls_sideways(browser: Any, site: tuple[str, Path]) -> None:
    address, folder = site
    for page in pages(folder):
        for width in WIDTHS:
            screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            browser.get(f"{address}/{page}")
            root = "return document.documentElement"
            wide = browser.execute_script(f"{root}.scrollWidth > {root[7:]}.clientWidth")
            assert not wide, (page, width)
            assert browser.execute_script(TOO_WIDE) == [], (page, width)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_accessible(scheme: str, browser: Any, site: tuple[str, Path]) -> None:
    address, folder = site
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    screen = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    for page in pages(folder):
        browser.get(f"{address}/{page}")
        checker = axe.Axe(browser)
        checker.inject()
        found = checker.run(options=OPTIONS)
        assert [(v["id"], v["nodes"][0]["html"]) for v in found["violations"]] == [], page
