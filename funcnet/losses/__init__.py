"""Losses: constructors of pairs ``(apply, vjp)``, a scalar of a prediction and a target.

``reduction`` is "mean", over all elements unless the docstring says otherwise, or "sum".
Gradients are with respect to the prediction; ``d`` is the cotangent of the value, and ``n`` what
the sum over the elements is divided by.
"""

from funcnet.losses.binary import (
    bce as bce,
    bce_with_logits as bce_with_logits,
    hinge as hinge,
)
from funcnet.losses.classification import (
    cross_entropy as cross_entropy,
    nll as nll,
)
from funcnet.losses.divergence import (
    kl_div as kl_div,
)
from funcnet.losses.lift import (
    pointwise as pointwise,
)
from funcnet.losses.regression import (
    huber as huber,
    mae as mae,
    mse as mse,
    smooth_l1 as smooth_l1,
)
