"""``python -m docs.browser``: every page of the built site in Chromium, at three widths, light and dark.

The check fails, with status 1, where a page has no heading, is wider than the window, logs an error or misses a file;
where the browser asks another host; and where a search does not find its page.  It needs the ``docs`` extra, and
Chromium (``apt-get install chromium``), which it looks for and does not install.
"""

import argparse
import shutil
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SITE = Path(__file__).parent.parent / "build" / "docs" / "site"
WIDTHS = (390, 820, 1280)
SCHEMES = ("light", "dark")
SEARCHES = {
    "rmsnorm": "kernels/fused_residual_add_rms_norm.html",
    "flash attention": "kernels/dense_attention.html",
    "install": "install.html",
    "sinkhorn": "kernels/mhc_fused_static.html",
}
"""What people look for, and a page that the search must list."""

TOO_WIDE = """() => {
  const root = document.documentElement, limit = root.clientWidth + 1;
  if (root.scrollWidth <= limit) return '';
  const wide = [...document.querySelectorAll('.md-content *')].filter(e => e.getBoundingClientRect().right > limit);
  return `is ${root.scrollWidth} wide in a window of ${root.clientWidth}: ` +
    wide.slice(0, 3).map(e => e.tagName + '.' + e.className + ' ' + e.textContent.trim().slice(0, 40)).join('; ');
}"""
RESULTS = """() => {
  const found = [];
  const walk = root => root.querySelectorAll('*').forEach(e => {
    if (e.tagName == 'A' && e.href.includes('h=')) found.push(new URL(e.href).pathname.slice(1));
    if (e.shadowRoot) walk(e.shadowRoot);
  });
  walk(document);
  return found;
}"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nothing: the browser tells what failed."""


def check(site: Path, chromium: str, widths: tuple[int, ...] = WIDTHS) -> list[str]:
    """What is wrong with the site in this browser: nothing, if the list is empty."""
    from playwright.sync_api import sync_playwright

    names = sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html") if p.name != "404.html")
    if not names:
        raise ValueError(f"site must be a built one, got {site}: run `make docs`")
    handler = partial(_Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_address[1]}"
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        wrong: list[str] = []
        for scheme in SCHEMES:
            page = browser.new_context(color_scheme=scheme).new_page()
            wrong += [f"{line} ({scheme})" for line in _pages(page, base, names, widths)]
        wrong += _searches(page, base)
        browser.close()
        server.shutdown()
    return list(dict.fromkeys(wrong))


def _pages(page: Any, base: str, names: list[str], widths: tuple[int, ...]) -> Iterator[str]:
    """Every page, and its width in every window."""
    heard: list[str] = []
    page.on("console", lambda m: heard.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("response", lambda r: heard.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    page.on("request", lambda r: None if r.url.startswith((base, "data:")) else heard.append(f"asks {r.url}"))
    for name in names:
        page.goto(f"{base}/{name}", wait_until="load")
        if not page.locator("h1").count():
            yield f"{name}: has no heading"
        for width in widths:
            page.set_viewport_size({"width": width, "height": 900})
            if wide := page.evaluate(TOO_WIDE):
                yield f"{name}: {wide}"
        yield from (f"{name}: {line}" for line in heard)
        heard.clear()


def _searches(page: Any, base: str) -> Iterator[str]:
    page.set_viewport_size({"width": max(WIDTHS), "height": 900})
    for query, wanted in SEARCHES.items():
        page.goto(f"{base}/index.html", wait_until="load")
        page.locator(".md-search__button").first.click()
        page.get_by_placeholder("Search").first.fill(query)
        found: list[str] = []
        for _ in range(50):
            page.wait_for_timeout(100)
            found = page.evaluate(RESULTS)
            if wanted in found:
                break
        else:
            yield f"a search for {query!r} does not find {wanted}: {found}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.browser", description=__doc__)
    parser.add_argument("--site", type=Path, default=SITE)
    parser.add_argument("--chromium", default=find())
    options = parser.parse_args()
    if options.chromium is None:
        parser.error("--chromium must be a browser: none was found")
    wrong = check(options.site, options.chromium)
    print("\n".join(wrong) or f"every page of {options.site} is in order, and the search finds its pages")
    return bool(wrong)


def find() -> str | None:
    """A Chromium on this machine, or None."""
    return shutil.which("chromium") or shutil.which("google-chrome")


if __name__ == "__main__":
    sys.exit(main())
