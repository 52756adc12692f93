"""``python -m docs``: pages, site, and a check of every link; what ``make docs`` runs."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from docs import config, formulas, links, pages

ROOT = Path(__file__).parent.parent


def main(out: Path) -> int:
    """Build below ``out`` and return the exit status."""
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
    return bool(broken)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m docs", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs", help="made anew")
    sys.exit(main(parser.parse_args().out.resolve()))
