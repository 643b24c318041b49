"""Builds the wheel, checks what is in it, and installs it into the environment that runs this script."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"


def main() -> int:
    for old in DIST.glob("flashcore-*.whl"):
        old.unlink()
    subprocess.run(["maturin", "build", "--release", "--quiet", "--out", str(DIST)], cwd=ROOT, check=True)
    (wheel,) = DIST.glob("flashcore-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.2f} MiB, {len(names)} files")
    foreign = [name for name in names if not name.startswith(("flashcore/", "flashcore-"))]
    if foreign:
        print(f"the wheel holds files that are not the package's: {foreign}")
        return 1
    return subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", str(wheel)], check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
