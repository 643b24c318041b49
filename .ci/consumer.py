"""Packs the crate, checks its size, and builds and runs a consumer of the packed crate in a bare environment.

The consumer sees no nvcc and no Python; it runs on the GPU where there is one, and otherwise shows the typed error for
the missing driver and then works on the CPU backend.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 9 << 20  # the registry's cap is 10 MiB

MANIFEST = """\
[package]
name = "consumer"
version = "0.1.0"
edition = "2024"

[dependencies]
flashcore-rs = {{ path = "{crate}" }}
half = "2"

[workspace]
"""

# Feature sets with which other libraries in the same program may have pinned cudarc.
CUDARC_FEATURES = (
    ("candle", '["std", "driver", "f16", "cuda-12080", "dynamic-linking"]'),
    ("vortex", '["std", "driver", "f16", "cuda-12080", "fallback-dynamic-loading"]'),
)


def package() -> Path:
    """Runs `cargo package` and returns the packed crate."""
    subprocess.run(
        ["cargo", "package", "-p", "flashcore-rs", "--no-verify", "--allow-dirty", "--quiet"], cwd=ROOT, check=True
    )
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return max((target / "package").glob("flashcore-rs-*.crate"), key=lambda path: path.stat().st_mtime)


def bare_environment() -> dict[str, str]:
    """A PATH with the Rust and C linkers' tools only, and no Python or CUDA variables."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "CUDA", "VIRTUAL_ENV"))}
    tools = tempfile.mkdtemp(prefix="bare-path-")
    for tool in ("cargo", "rustc", "cc", "ld", "as", "ar"):
        found = shutil.which(tool)
        if found:
            Path(tools, tool).symlink_to(found)
    return {**keep, "PATH": tools}


def consumer(folder: Path, crate: Path, extra: str = "") -> Path:
    """Writes a consumer crate whose program is the crate's own inference example."""
    (folder / "src").mkdir(parents=True)
    (folder / "Cargo.toml").write_text(MANIFEST.format(crate=crate).replace("[workspace]", extra + "\n[workspace]"))
    shutil.copy(crate / "examples" / "minimal_inference.rs", folder / "src" / "main.rs")
    shutil.copy(ROOT / "Cargo.lock", folder / "Cargo.lock")
    return folder


def main() -> int:
    packed = package()
    size = packed.stat().st_size
    print(f"{packed.name}: {size / 2**20:.2f} MiB of {LIMIT / 2**20:.0f} MiB")
    if size > LIMIT:
        print("the packed crate is too large")
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with tarfile.open(packed) as archive:
            archive.extractall(folder, filter="data")
        crate = next(path for path in folder.glob("flashcore-rs-*") if path.is_dir())
        environment = bare_environment()
        target = {"CARGO_TARGET_DIR": str(folder / "target")}
        program = consumer(folder / "consumer", crate)
        subprocess.run(["cargo", "run", "--quiet"], cwd=program, env={**environment, **target}, check=True)
        for name, features in CUDARC_FEATURES:
            extra = f'cudarc = {{ version = "0.19", default-features = false, features = {features} }}\n'
            program = consumer(folder / f"with-{name}", crate, extra)
            subprocess.run(["cargo", "check", "--quiet"], cwd=program, env={**environment, **target}, check=True)
            print(f"builds beside cudarc as {name} pins it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
