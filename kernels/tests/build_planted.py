"""Builds a bundle of the Hopper forward for each planted fault: `python -m kernels.tests.build_planted OUTDIR`.

Each is compiled from a copy of `kernels/` with the fault in it, by the same ahead-of-time path as the real bundle.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kernels.tests.planted_faults import planted_sources

KERNELS = Path(__file__).parents[1]

BUILD = """
import sys
from kernels import bundle, compile, specs
wanted = [specs.hopper("f16", 64, band) for band in (False, True)]
built = {spec.name: members for spec, members in compile.compile_all(wanted, jobs=2)}
for name, members in built.items():
    if isinstance(members, str):
        sys.exit(f"{name}: {members}")
entries = [(compile.variant_entry(spec, built[spec.name]), [m.code for m in built[spec.name]]) for spec in wanted]
open(sys.argv[1], "wb").write(bundle.pack("sm_90a", compile.compiler_versions(), entries))
"""


def main(out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    for fault, source in planted_sources():
        with tempfile.TemporaryDirectory() as temporary:
            shutil.copytree(KERNELS, Path(temporary, "kernels"), ignore=shutil.ignore_patterns("__pycache__"))
            Path(temporary, "kernels", "forward_hopper.py").write_text(source)
            target = out.resolve() / f"{fault.tool}-{fault.name}.fcb"
            environment = {**os.environ, "PYTHONPATH": temporary}
            command = [sys.executable, "-c", BUILD, str(target)]
            subprocess.run(command, cwd=temporary, env=environment, check=True)
        print(f"{target.name}: expect {fault.finding!r} from {fault.tool}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
