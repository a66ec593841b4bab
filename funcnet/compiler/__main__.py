"""Have g++ parse, once a machine, what each program includes: ``python -m funcnet.compiler``."""

import time

from funcnet.compiler.build import make_headers

start = time.perf_counter()
for made in make_headers():
    print(f"{made}: {made.stat().st_size / 1e6:.0f} MB")
print(f"{time.perf_counter() - start:.1f} s")
