"""Check a built wheel: the package and nothing else, typed, and of the version that the tag and the changelog say."""

import re
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "lightning_norm"


def faults(wheel: Path, tag: str) -> list[str]:
    """Return what is wrong with a wheel, a sentence each.

    Args:
        wheel: the file.
        tag: what was tagged, such as "v1.2.3"; empty where nothing was.
    """
    version = wheel.name.split("-")[1]
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"{PACKAGE}-{version}.dist-info/"
    files = {
        p.relative_to(ROOT).as_posix() for p in (ROOT / PACKAGE).rglob("*") if p.suffix in (".py", ".pyi", ".json")
    }
    expected = files | {f"{PACKAGE}/py.typed"}
    found = [f"{name} is missing." for name in sorted(expected - names)]
    found += [f"{name} does not belong into it." for name in sorted(names - expected) if not name.startswith(info)]
    if tag and tag != f"v{version}":
        found.append(f"The tag is {tag} and the version {version}: set lightning_norm.__version__, or tag v{version}.")
    if tag and not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", _changelog(), re.M):
        found.append(f"CHANGELOG.md has no heading '## [{version}] - YYYY-MM-DD'.")
    return found


def _changelog() -> str:
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    folder, tag = Path(sys.argv[1]), sys.argv[2]
    (wheel,) = folder.glob("*.whl")
    found = faults(wheel, tag)
    print("\n".join(found) or f"{wheel.name}: {len(zipfile.ZipFile(wheel).namelist())} files, nothing wrong.")
    sys.exit(bool(found))
