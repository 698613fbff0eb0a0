"""`make bench`: the scans, the search, then pruned models. Ends with 1 if one of them failed, after all have run."""

import runpy
import sys
from pathlib import Path

failed = []
for name in ("bench_scans", "bench_search", "bench_removal"):
    print(f"{name}:", file=sys.stderr, flush=True)
    try:
        runpy.run_path(str(Path(__file__).with_name(f"{name}.py")), run_name="__main__")
    except SystemExit as ended:
        failed += [name] if ended.code else []
sys.exit(f"failed: {', '.join(failed)}" if failed else None)
