"""Schedules: numbers, such as a learning rate, that are pure functions of the step.

A schedule takes the number of steps so far, an int or a 0-d tensor, and gives a 0-d float64 tensor.
An optimizer takes one as its learning rate, and any function of the step is one too. It has no
state, never waits for a device, and under `funcnet.jit` no step compiles anything anew. Options
that are numbers may be 0-d tensors, such as a peak that is swept by `funcnet.vmap`. A tensor of
several steps gives the values at all of them, such as a curve to plot.

Those that torch.optim.lr_scheduler has take its options and give its numbers; the first argument
is the learning rate that torch's scheduler finds in the optimizer. The others are optax's.

| torch.optim.lr_scheduler | here |
|---|---|
| ConstantLR | `constant` |
| LinearLR | `linear` |
| PolynomialLR | `polynomial` |
| ExponentialLR | `exponential` |
| StepLR, MultiStepLR | `step`, `multistep` |
| CosineAnnealingLR | `cosine` |
| CosineAnnealingWarmRestarts | `cosine_restarts` |
| CyclicLR | `cyclic`, `cyclic_momentum` |
| OneCycleLR | `one_cycle`, `one_cycle_momentum` |
| SequentialLR | `join` |
| ChainedScheduler | `product` |
| LambdaLR | ``lambda step: lr * f(step)`` |
| MultiplicativeLR | `multiplicative` |
| ReduceLROnPlateau | `reduce_on_plateau` |

One's own schedule is a formula of tensors: the step is a 0-d tensor, whose value nobody knows when
a program is compiled. So ``torch.where(step < 10, ...)`` takes the place of an ``if`` on the step,
and ``clamp`` that of ``min`` and ``max``:

>>> import funcnet as fn
>>> halves = lambda step: torch.where(step < 2, 0.1, 0.05)
>>> ramp = lambda step: 0.1 * torch.clamp((step + 1) / 4, max=1.0)
>>> halves(torch.arange(4)), ramp(torch.arange(4))
(tensor([0.1000, 0.1000, 0.0500, 0.0500]), tensor([0.0250, 0.0500, 0.0750, 0.1000]))
>>> optimizer = fn.adamw(fn.schedules.warmup_cosine(0.0, 1e-3, 100, 1000))
>>> fn.schedules.step(1.0, step_size=2)(torch.arange(5))
tensor([1.0000, 1.0000, 0.1000, 0.1000, 0.0100], dtype=torch.float64)
"""

from funcnet import reference as _reference
from funcnet.optimizers.schedules import lift as _lift
from funcnet.optimizers.schedules.annealing import (
    constant as constant,
    cosine as cosine,
    cosine_decay as cosine_decay,
    exponential as exponential,
    linear as linear,
    multiplicative as multiplicative,
    multistep as multistep,
    polynomial as polynomial,
    step as step,
)
from funcnet.optimizers.schedules.compositions import (
    join as join,
    piecewise as piecewise,
    piecewise_constant as piecewise_constant,
    piecewise_interpolate as piecewise_interpolate,
    product as product,
)
from funcnet.optimizers.schedules.cycles import (
    cosine_restarts as cosine_restarts,
    cyclic as cyclic,
    cyclic_momentum as cyclic_momentum,
    one_cycle as one_cycle,
    one_cycle_momentum as one_cycle_momentum,
)
from funcnet.optimizers.schedules.plateau import (
    Plateau as Plateau,
    PlateauState as PlateauState,
    reduce_on_plateau as reduce_on_plateau,
)
from funcnet.optimizers.schedules.warmup import (
    inverse_sqrt as inverse_sqrt,
    sgdr as sgdr,
    warmup_constant as warmup_constant,
    warmup_cosine as warmup_cosine,
    warmup_exponential as warmup_exponential,
    warmup_stable_decay as warmup_stable_decay,
)

Schedule = _lift.Schedule
"""A function of the number of steps so far, an int or a 0-d tensor, that gives a 0-d tensor."""

__docformat__ = "google"
__doc__ = _reference.described(__name__, __doc__)
__all__ = _reference.names(__name__)
