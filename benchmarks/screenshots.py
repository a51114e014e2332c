"""Take all pictures of docs/img anew: train, compare, build the site, and photograph TensorBoard and the site's pages.

    python -m benchmarks.screenshots [--logdir DIR] [--comparison DIR] [--epochs 5] [--only site]

It needs the extras ``examples`` and ``docs`` and a ``chromium`` (or Chrome) on the path: ``apt-get install chromium``.
A ``--logdir`` that already holds runs (folders ``sn`` and ``ubn``) is photographed as it is, and the picture of a
finished ``--comparison`` is taken as it is; otherwise both are trained first, about half an hour on two cores. A page
of the site that asks another host for anything is an error.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from PIL import Image
from tensorboard import program
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "img"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 60  # seconds
COLORS = 192
FIND = """
const all = (selector, root = document) => [...root.querySelectorAll(selector),
  ...[...root.querySelectorAll('*')].flatMap(e => e.shadowRoot ? all(selector, e.shadowRoot) : [])];
const seen = selector => all(selector).filter(e => e.getBoundingClientRect().width > 0);
"""
LEGENDS = """
seen('paper-checkbox').filter(e => e.textContent.includes('outliers') && e.checked).forEach(e => e.click());
seen('.toggle-matches-button').forEach(e => e.click())
"""
ACTUAL_SIZE = "seen('paper-checkbox')[0].click()"
NOTHING = "0"
PAGES = {  # file -> run, plugin, what must be there, what to do then, width, height
    "tensorboard_sn_charts.png": ("sn", "custom_scalars", "vz-line-chart2", LEGENDS, 1480, 1455),
    "tensorboard_sn_images.png": ("sn", "images", "#main-image-container img", ACTUAL_SIZE, 1480, 960),
    "tensorboard_sn_table.png": ("sn", "text", "table", NOTHING, 1480, 800),
    "tensorboard_sn_hparams.png": ("sn", "hparams", "#vaadin-grid-cell-0", NOTHING, 1480, 420),
    "tensorboard_ubn_charts.png": ("ubn", "custom_scalars", "vz-line-chart2", LEGENDS, 1480, 1455),
    "tensorboard_ubn_images.png": ("ubn", "images", "#main-image-container img", ACTUAL_SIZE, 1480, 1560),
}
HEAT_MAP = "heat_map.png"
COMPARISON = "comparison.png"
COMPARE = (
    *("compare", "--config", "trainer.yaml", "--norms", "bn,gn,sn", "--seeds", "3", "--metric", "val_acc"),
    *("--sweep", "data.init_args.batch_size=4,16,64"),
)
DARK = "document.body.setAttribute('data-md-color-scheme', 'slate')"
SITE = {  # file -> page, what to do when it is there, width, height
    "site_index.png": ("", NOTHING, 1280, 1300),
    "site_dark.png": ("", DARK, 1280, 1300),
    "site_start.png": ("start/", NOTHING, 1280, 1300),
    "site_card.png": ("cards/sn/", NOTHING, 1280, 1300),
    "site_guide.png": ("schedules/", NOTHING, 1280, 1300),
    "site_reference.png": ("reference/normalizers/", NOTHING, 1280, 1300),
    "site_phone.png": ("which_normalizer/", NOTHING, 420, 900),
}


class Browser:
    """A headless Chromium that is told what to do over a pipe, in the DevTools protocol.

    Args:
        program: the executable.
        profile: an empty folder.
    """

    def __init__(self, program: str, profile: str) -> None:
        commands, self._out = os.pipe()
        self._in, answers = os.pipe()
        high = [os.dup(commands), os.dup(answers)]  # Chromium takes descriptors 3 and 4

        def place() -> None:
            os.dup2(high[0], 103), os.dup2(high[1], 104), os.dup2(103, 3), os.dup2(104, 4)

        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            [program, *options, f"--user-data-dir={profile}"],
            preexec_fn=place,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._number, self._buffer, self._session = 0, b"", ""
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                self._buffer += os.read(self._in, 1 << 20)
            answer, _, self._buffer = self._buffer.partition(b"\0")
            reply = json.loads(answer)
            if reply.get("method") == "Network.requestWillBeSent":
                self.requests.append(reply["params"]["request"]["url"])
            if reply.get("id") == self._number:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']['message']}")
                result: dict[str, Any] = reply["result"]
                return result

    def run(self, script: str) -> Any:
        """Run a script in the page and return its value."""
        result = self.send("Runtime.evaluate", expression=f"{{{FIND}{script}}}", returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def close(self) -> None:
        """End the browser."""
        self.send("Browser.close")
        self._process.wait(PATIENCE)


@contextmanager
def browser() -> Iterator[Browser]:
    """Start the first browser that is installed."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        sys.exit(f"No browser: none of {', '.join(BROWSERS)} is on the path. Debian: apt-get install chromium.")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        opened = Browser(executable, profile)
        try:
            yield opened
        finally:
            opened.close()


def train(logdir: Path, norm: str, epochs: int) -> None:
    """Train the digits as examples/configs has it."""
    command = [sys.executable, "-m", "lightning_norm", "fit", "--config", f"examples/configs/digits_{norm}.yaml"]
    options = ["--trainer.max_epochs", str(epochs), "--trainer.default_root_dir", str(logdir / norm)]
    subprocess.run([*command, *options], cwd=ROOT, check=True)


def serve(logdir: Path) -> str:
    """Start TensorBoard on a free port and return its address."""
    board = program.TensorBoard()
    board.configure(argv=[None, "--logdir", str(logdir), "--port", "0"])
    return str(board.launch())


def heat_map(logdir: Path) -> Image.Image:
    """Return the last heat map that was logged below a folder."""
    for file in sorted(logdir.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={"images": 0}).Reload()
        for tag in events.Tags()["images"]:
            if tag.endswith("/choice"):
                return Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string))
    raise FileNotFoundError(f"{logdir}: no run with a heat map.")


def comparison(folder: Path) -> Image.Image:
    """Return the picture of the comparison over batch sizes, which is run where the folder does not hold it."""
    if not (folder / "sweep_batch_size.png").exists():
        paths = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
        command = [sys.executable, "-m", "lightning_norm", *COMPARE, "--out", str(folder)]
        subprocess.run(command, cwd=ROOT / "examples", env={**os.environ, "PYTHONPATH": paths}, check=True)
    return Image.open(folder / "sweep_batch_size.png")


@contextmanager
def served_site(folder: Path) -> Iterator[str]:
    """Build the site into a folder and serve it on this machine."""
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet", "-d", str(folder)], cwd=ROOT, check=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    """Says nothing of each request."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def save(image: Image.Image, file: Path) -> None:
    """Reduce a picture to few colours and write it."""
    image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file.relative_to(ROOT)}: {file.stat().st_size // 1024} KB")


def at_rest(tab: Browser, end: float) -> bytes:
    """Return the picture of a page once it no longer changes, which takes long on a busy machine, or at the end."""
    last = b""
    while True:
        time.sleep(3)
        picture = base64.b64decode(tab.send("Page.captureScreenshot", format="png")["data"])
        if picture == last or time.monotonic() > end:
            return picture
        last = picture


def photograph(tab: Browser, address: str, wanted: str, action: str, file: Path, width: int, height: int) -> None:
    """Let the page render, save what is seen, and reduce it to few colours."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    tab.send("Emulation.setDeviceMetricsOverride", **size)
    tab.send("Page.navigate", url="about:blank")
    tab.send("Page.navigate", url=address)
    end = time.monotonic() + PATIENCE
    while not tab.run(f"document.readyState == 'complete' && seen('{wanted}').length"):
        if time.monotonic() > end:
            raise TimeoutError(f"{address}: no {wanted} after {PATIENCE} s.")
        time.sleep(0.5)
    at_rest(tab, end)
    tab.run(action)
    picture = at_rest(tab, end + PATIENCE)
    with Image.open(io.BytesIO(picture)) as image:
        save(image, file)


def photograph_site(tab: Browser, pages: dict[str, tuple[str, str, int, int]], folder: Path) -> None:
    """Build the site and photograph pages of it.

    Raises:
        RuntimeError: a page has asked another host for something.
    """
    tab.send("Network.enable")
    with served_site(folder) as address:
        for name, (page, action, width, height) in pages.items():
            tab.requests.clear()
            photograph(tab, address + page, ".md-content h1", action, IMAGES / name, width, height)
            if elsewhere := [url for url in tab.requests if not url.startswith((address, "data:", "about:", "blob:"))]:
                raise RuntimeError(f"{page or 'index'}: asks {', '.join(elsewhere)}.")


def main() -> None:
    """Train and compare if need be, and write docs/img/*.png."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--logdir", type=Path, help="folder of the runs; trained into if it is empty")
    parser.add_argument("--comparison", type=Path, help="folder of lightning-norm compare; run into it if it is empty")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--only", default="", help="part of the names of the pictures to take")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, browser() as tab:
        IMAGES.mkdir(parents=True, exist_ok=True)
        logdir = arguments.logdir or Path(scratch)
        pages = {name: page for name, page in PAGES.items() if arguments.only in name}
        runs = {run for run, *_ in pages.values()} | ({"sn"} if arguments.only in HEAT_MAP else set())
        for norm in sorted(runs):
            if not any((logdir / norm).rglob("events.out.tfevents.*")):
                train(logdir, norm, arguments.epochs)
        addresses = {norm: serve(logdir / norm) for norm in sorted({run for run, *_ in pages.values()})}
        for name, (run, plugin, wanted, action, width, height) in pages.items():
            photograph(tab, f"{addresses[run]}#{plugin}", wanted, action, IMAGES / name, width, height)
        if arguments.only in HEAT_MAP:
            save(heat_map(logdir / "sn"), IMAGES / HEAT_MAP)
        if arguments.only in COMPARISON:
            save(comparison(arguments.comparison or Path(scratch) / "compare"), IMAGES / COMPARISON)
        site = {name: page for name, page in SITE.items() if arguments.only in name}
        if site:
            photograph_site(tab, site, Path(scratch) / "site")


if __name__ == "__main__":
    main()
