"""`make bench`: the scans, the search, then pruned models."""

import runpy
import sys
from pathlib import Path

for name in ("bench_scans", "bench_search", "bench_removal"):
    print(f"{name}:", file=sys.stderr, flush=True)
    runpy.run_path(str(Path(__file__).with_name(f"{name}.py")), run_name="__main__")
