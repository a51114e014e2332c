"""Take the pictures of docs/monitor.md anew: train, start TensorBoard, photograph its pages in a headless Chromium.

    python docs/screenshots.py [--logdir DIR] [--epochs 6]

It needs the extra ``examples`` and a ``chromium`` (or Chrome) on the path: ``apt-get install chromium``. A ``--logdir``
that already holds a run is photographed as it is.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from tensorboard import program

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "img"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PAGES = {  # file -> fragment of the address, width, height
    "tensorboard_custom_scalars.png": ("custom_scalars", 1280, 1150),
    "tensorboard_images.png": ("images", 1280, 900),
    "tensorboard_text.png": ("text", 1280, 800),
    "tensorboard_hparams.png": ("hparams", 1280, 500),
}
PATIENCE = 60  # seconds of the browser's own clock, which runs as fast as the page has nothing to wait for
COLORS = 192


def train(logdir: Path, epochs: int) -> None:
    """Train the digits with switchable normalization, as examples/configs/digits_sn.yaml has it."""
    command = [sys.executable, "-m", "lightning_norm", "fit", "--config", "examples/configs/digits_sn.yaml"]
    options = ["--trainer.max_epochs", str(epochs), "--trainer.default_root_dir", str(logdir)]
    subprocess.run([*command, *options], cwd=ROOT, check=True)


def serve(logdir: Path) -> str:
    """Start TensorBoard on a free port and return its address."""
    board = program.TensorBoard()
    board.configure(argv=[None, "--logdir", str(logdir), "--port", "0", "--load_fast", "false"])
    return str(board.launch())


def photograph(browser: str, address: str, file: Path, width: int, height: int) -> None:
    """Let the page render, save what is seen, and reduce it to few colours."""
    with tempfile.TemporaryDirectory() as profile:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            f"--virtual-time-budget={PATIENCE * 1000}",
            f"--screenshot={file}",
        ]
        subprocess.run([browser, *options, address], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with Image.open(file) as image:
        image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> None:
    """Train if need be, and write docs/img/tensorboard_*.png."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--logdir", type=Path, help="folder of a run; trained into if it is empty")
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"No browser: none of {', '.join(BROWSERS)} is on the path. Debian: apt-get install chromium.")
    with tempfile.TemporaryDirectory() as scratch:
        logdir = arguments.logdir or Path(scratch)
        if not any(logdir.rglob("events.out.tfevents.*")):
            train(logdir, arguments.epochs)
        address = serve(logdir)
        IMAGES.mkdir(parents=True, exist_ok=True)
        for name, (fragment, width, height) in PAGES.items():
            photograph(browser, f"{address}#{fragment}", IMAGES / name, width, height)
            print(f"docs/img/{name}: {(IMAGES / name).stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
