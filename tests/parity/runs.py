"""Running the cases of a class, all of them or a sample."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from tests.parity import exceptions, names
from tests.parity.compare import check
from tests.parity.report import Outcome, Report, outcome
from tests.parity.samples import OWN_CASES, REFUSED, TORCH, samples_of

FEW = 2


def some(cases: Sequence[Any], count: int) -> list[Any]:
    """``count`` of the cases, evenly spread from the first on.

    >>> some("abcdefg", 3), some("ab", 3)
    (['a', 'c', 'e'], ['a', 'b'])
    """
    return (
        [cases[i * len(cases) // count] for i in range(count)] if count < len(cases) else [*cases]
    )


def add_class(
    report: Report,
    name: str,
    dtypes: Iterable[torch.dtype],
    jit: str = "none",
    count: int | None = None,
) -> None:
    """Run the cases of a class, or ``count`` of each source; each goes into the report."""
    cls = getattr(nn.modules, name)
    if name in exceptions.CLASSES:
        signature = Outcome("unsupported", exceptions.CLASSES[name])
    else:
        signature = outcome(lambda: names.check_signature(cls))
    report.add(name, "signature", name, signature)
    samples = samples_of(name, dtypes)
    for source in (TORCH, REFUSED, OWN_CASES):
        cases = samples[source] if count is None else some(samples[source], count)
        for sample in cases:
            report.add(name, source, str(sample), outcome(lambda sample=sample: check(sample)))
    compiled = [each for each in samples[TORCH] + samples[OWN_CASES] if each.dtype == torch.float64]
    for sample in {"none": [], "few": some(compiled, FEW), "all": compiled}[jit]:
        if signature.kind != "unsupported":
            report.add(
                name, "jit", str(sample), outcome(lambda sample=sample: check(sample, jit=True))
            )
