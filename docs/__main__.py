"""``python -m docs``: pages, site, a check of every link and, where there is a browser, of every page."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from docs import browser, config, formulas, links, pages
from kernel_index.core.target import has_package

ROOT = Path(__file__).parent.parent


def main(out: Path, chromium: str | None = None) -> int:
    """Build below ``out``, look at the pages in this browser, and return the exit status."""
    shutil.rmtree(out, ignore_errors=True)
    nav = pages.write(out / "pages")
    settings = out / "zensical.toml"
    settings.write_text(config.write(nav))
    builder = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(settings)]
    done = subprocess.run(builder, check=False, cwd=ROOT)  # griffe imports our extension from here
    if done.returncode:
        return done.returncode
    written = formulas.render(out / "site")
    broken = links.broken(out / "site")
    count = len(list((out / "site").rglob("*.html")))
    print("\n".join(broken) or f"{count} pages, {written} formulas, no broken link: {out / 'site'}")
    wrong = browser.check(out / "site", chromium) if chromium and not broken else []
    print("\n".join(wrong) or ("every page is in order in a browser" if chromium else "no browser looked at the pages"))
    return bool(broken or wrong)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m docs", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs", help="made anew")
    parser.add_argument("--browser", action=argparse.BooleanOptionalAction, default=True, help="look at every page")
    options = parser.parse_args()
    found = browser.find() if options.browser and has_package("playwright") else None
    sys.exit(main(options.out.resolve(), found))
