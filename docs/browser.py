"""``python -m docs.browser``: every page of the built site opened in Chromium, and a search that finds its page.

A page that the browser cannot load, a script that fails, a file that is not there, or a search without its result ends
the check with status 1.  The site is served from this machine, and so is the page that drives the browser.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SITE = Path(__file__).parent.parent / "build" / "docs" / "site"
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET = "--disable-component-update --disable-sync --remote-debugging-port=0"
PROBE, REPORT = "/probe", "/report"

DRIVER = """<!doctype html><link rel=icon href=data:,><body><iframe id=f width=1300 height=900></iframe><script>
const frame = document.getElementById('f'), wait = ms => new Promise(done => setTimeout(done, ms));
const open = url => new Promise(done => { frame.onload = done; frame.src = url; });
function every(root, pick) {
  const found = [];
  root.querySelectorAll('*').forEach(e => {
    if (pick(e)) found.push(e);
    if (e.shadowRoot) found.push(...every(e.shadowRoot, pick));
  });
  return found;
}
async function until(look) {
  for (let i = 0; i < 100; i++) { const found = look(); if (found) return found; await wait(200); }
}
async function main() {
  const report = {pages: {}, errors: [], results: []};
  for (const page of PAGES) {
    await open(page);
    frame.contentWindow.onerror = message => report.errors.push(page + ': ' + message);
    const title = await until(() => frame.contentDocument.querySelector('h1'));
    report.pages[page] = title ? title.textContent : '';
  }
  await open('index.html');
  const view = frame.contentWindow, root = frame.contentDocument;
  const button = await until(() => root.querySelector('.md-search__button'));
  if (button) button.click();
  const field = await until(() => every(root, e => e.tagName == 'INPUT' && e.placeholder == 'Search')[0]);
  if (field) {
    field.focus();
    field.value = QUERY;
    field.dispatchEvent(new view.Event('input', {bubbles: true}));
    const isResult = e => e.tagName == 'A' && e.href.includes('h=' + QUERY);
    await until(() => every(root, isResult).length);
    report.results = every(root, isResult).map(e => new URL(e.href).pathname);
  }
  await fetch('/report', {method: 'POST', body: JSON.stringify(report)});
}
main();
</script>"""


class _Handler(SimpleHTTPRequestHandler):
    """Serves the site and the driver, keeps what was not found, and takes the report."""

    def __init__(self, *args: Any, driver: str, missing: list[str], reports: list[dict[str, Any]], **kwargs: Any):
        self.driver, self.missing, self.reports = driver, missing, reports
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        if self.path != PROBE:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.driver.encode())

    def do_POST(self) -> None:
        self.reports.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing: what failed is in the report."""

    def send_error(self, code: int, *rest: Any, **kwargs: Any) -> None:
        self.missing.append(f"{code} {self.path}")
        super().send_error(code, *rest, **kwargs)


def check(site: Path, chromium: str, query: str, page: str, seconds: float) -> list[str]:
    """What is wrong with the site in this browser: nothing, if the list is empty."""
    pages = sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html") if p.name != "404.html")
    if not pages:
        raise ValueError(f"site must be a built one, got {site}: run `make docs`")
    driver = DRIVER.replace("PAGES", json.dumps(pages)).replace("QUERY", json.dumps(query))
    missing: list[str] = []
    reports: list[dict[str, Any]] = []
    handler = partial(_Handler, directory=str(site), driver=driver, missing=missing, reports=reports)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, tempfile.TemporaryDirectory() as profile:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}{PROBE}"
        command = [chromium, *FLAGS.split(), *QUIET.split(), f"--user-data-dir={profile}", url]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        waited = threading.Event()
        while not reports and browser.poll() is None and seconds > 0:
            waited.wait(0.2)
            seconds -= 0.2
        browser.terminate()
        browser.wait()
        server.shutdown()
    if not reports:
        return ["the browser reported nothing", *missing]
    report = reports[0]
    wrong = [f"{name}: has no heading" for name in pages if not report["pages"].get(name)]
    if f"/{page}" not in report["results"]:
        wrong.append(f"a search for {query!r} does not find {page}: {report['results']}")
    return list(dict.fromkeys([*wrong, *report["errors"], *missing]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.browser", description=__doc__)
    parser.add_argument("--site", type=Path, default=SITE)
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    parser.add_argument("--seconds", type=float, default=180.0, help="how long to wait for the browser")
    options = parser.parse_args()
    if options.chromium is None:
        parser.error("--chromium must be a browser: none was found")
    wrong = check(options.site, options.chromium, "sinkhorn", "kernels/mhc_fused_static.html", options.seconds)
    print("\n".join(wrong) or f"every page of {options.site} loads, and the search finds its page")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
