"""The site as it is published: built strictly, every link, anchor and public name, nothing of another host."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import lightning_norm

pytest.importorskip("mkdocs")
ROOT = Path(__file__).parent.parent
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
THAT_LOAD = {"stylesheet", "icon", "preload", "preconnect", "prefetch", "dns-prefetch", "manifest", "modulepreload"}


class Page(HTMLParser):
    """What a page links to, what it loads, and the names that links may point at."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag in LOADED and values.get(LOADED[tag]):
            self.loads.append(values[LOADED[tag]])
        if tag == "link" and THAT_LOAD & set((values.get("rel") or "").split()):
            self.loads.append(values["href"])
        if values.get("style"):
            self.loads += re.findall(r"url\(['\"]?([^'\")]+)", values["style"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {file: Page(file.read_text(encoding="utf-8")) for file in folder.rglob("*.html")}


def target(site, page, link):
    """Return the file that a link of the site leads to, and its anchor."""
    root = min((file.parent for file in site), key=lambda folder: len(folder.parts))
    parts = urlsplit(link)
    file = page
    if parts.path:
        start = root if parts.path.startswith("/") else page.parent
        file = Path(os.path.normpath(start / unquote(parts.path).lstrip("/")))
    return file / "index.html" if file.is_dir() else file, unquote(parts.fragment)


def leads_nowhere(site, page, link):
    if urlsplit(link).scheme or page.name == "404.html":
        return False
    file, anchor = target(site, page, link)
    if not file.exists():
        return True
    return bool(anchor) and file in site and anchor not in site[file].ids


@pytest.mark.slow
def test_every_link_leads_somewhere(site):
    assert len(site) > 60
    lost = {(page.parent.name, link) for page in site for link in site[page].links if leads_nowhere(site, page, link)}
    assert not lost


@pytest.mark.slow
def test_no_page_asks_another_host(site):
    asked = {load for page in site.values() for load in page.loads if urlsplit(load).netloc}
    assert not asked
    for sheet in {target(site, page, load)[0] for page in site for load in site[page].loads if ".css" in load}:
        for url in re.findall(r"url\(['\"]?([^'\")]+)", sheet.read_text(encoding="utf-8")):
            assert url.startswith(("data:", "#")) or (sheet.parent / urlsplit(url).path).exists(), (sheet.name, url)
        assert "@import" not in sheet.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_reference_has_every_public_name(site):
    ids = set().union(*(page.ids for file, page in site.items() if "reference" in file.parts))
    public = {f"lightning_norm.{name}" for name in lightning_norm.__all__} - {"lightning_norm.normalizers"}
    testing = ("checks", "conform", "run_ranks")
    public |= {f"lightning_norm.testing.{name}" for name in testing}
    assert public | {"lightning_norm.layers.registry.normalizers"} <= ids


@pytest.mark.slow
def test_the_reference_has_no_private_name_and_repeats_nothing_that_is_inherited(site):
    ids = {name for page in site.values() for name in page.ids if name.startswith("lightning_norm.")}
    assert not [name for name in ids if re.search(r"\._[a-z]", name)]
    assert "lightning_norm.MomentNorm.forward" in ids
    assert not [name for name in ids if name.startswith("lightning_norm.BatchNorm.")]


@pytest.mark.slow
def test_formulas_and_doctests_are_no_raw_text(site):
    """Sphinx's marks are for Sphinx: none is left on a page."""
    for file in site:
        if "reference" in file.parts:
            text = re.sub(r"<(pre|code).*?</\1>", "", file.read_text(encoding="utf-8"), flags=re.S)
            assert not re.search(r":(math|class|func|meth|attr):|\.\. math|&gt;&gt;&gt;", text), file
    (formulas,) = [file for file in site if file.parts[-3:] == ("reference", "normalizers", "index.html")]
    assert formulas.read_text(encoding="utf-8").count('class="arithmatex"') > 20
