"""``python -m docs``: pages, site, and a check of every link; what ``make docs`` runs."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from docs import links, pages

ROOT = Path(__file__).parent.parent


def main(out: Path) -> int:
    """Build below ``out`` and return the exit status."""
    shutil.rmtree(out, ignore_errors=True)
    nav = pages.write(out / "pages")
    config = out / "zensical.toml"
    config.write_text(pages.config(nav))
    builder = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(config)]
    done = subprocess.run(builder, check=False)
    if done.returncode:
        return done.returncode
    broken = links.broken(out / "site")
    print("\n".join(broken) or f"{len(list((out / 'site').rglob('*.html')))} pages, no broken link: {out / 'site'}")
    return bool(broken)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m docs", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs", help="made anew")
    sys.exit(main(parser.parse_args().out.resolve()))
