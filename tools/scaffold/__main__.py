"""``python -m tools.scaffold FAMILY NAME``: what ``make new FAMILY=… NAME=…`` runs."""

from tools.scaffold import app

if __name__ == "__main__":
    app(prog_name="python -m tools.scaffold")
