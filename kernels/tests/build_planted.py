"""Builds a bundle of the Hopper forward for each planted fault: `python -m kernels.tests.build_planted OUTDIR`."""

from __future__ import annotations

import sys
from pathlib import Path

from kernels import edits, specs
from kernels.tests.planted_faults import FAULTS, SOURCE


def main(out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    for fault in FAULTS:
        wanted = [specs.hopper("f16", 64, band) for band in (False, True)]
        target = out / f"{fault.tool}-{fault.name}.fcb"
        target.write_bytes(edits.build(SOURCE.stem, fault.edits, wanted))
        print(f"{target.name}: expect {fault.finding!r} from {fault.tool}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
