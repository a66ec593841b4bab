"""``python -m tests.parity`` from the root of the repository: the table of parity with torch.nn.

A row for each class of ``torch.nn`` and each source of its cases: ``signature``, ``torch`` (the
samples of PyTorch's own module database, in float64, float32 and bfloat16, in train and eval mode),
``torch errors`` (those that torch refuses), ``own`` (each option, contiguous and not), ``jit``
(some of those compiled). It ends with status 1 if a case failed.
"""

import argparse
import sys

import torch
from torch import nn

from tests.parity.report import HEADER, Report
from tests.parity.runs import FEW, add_class
from tests.parity.samples import DTYPES


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("--class", dest="names", action="append", metavar="NAME")
    parser.add_argument("--dtype", dest="dtypes", action="append", choices=DTYPES)
    parser.add_argument(
        "--jit",
        nargs="?",
        choices=["none", "few", "all"],
        const="few",
        default="none",
        help=f"compile cases of float64, seconds each: {FEW} of each class, or all of them",
    )
    parser.add_argument("--verbose", action="store_true", help="tell of each case that is no pass")
    options = parser.parse_args()
    unknown = {*(options.names or [])} - {*nn.modules.__all__}
    if unknown:
        parser.error(f"torch.nn has no {', '.join(sorted(unknown))}")

    torch.set_num_threads(1)
    report = Report()
    dtypes = [DTYPES[name] for name in options.dtypes or DTYPES]
    print(HEADER)
    for name in sorted(options.names or nn.modules.__all__):
        add_class(report, name, dtypes, options.jit)
        print(*report.lines(name, options.verbose), sep="\n", flush=True)
    print(report.total())
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
