"""Losses: constructors of pairs ``(apply, vjp)``, of a prediction and a target.

``reduction`` is "mean", over all elements unless the docstring says otherwise, "sum", or "none":
then the value is a tensor with the loss of each element. Gradients are with respect to the
prediction, which some losses take as a tuple; ``d`` is the cotangent of an element, and ``n`` what
the sum over the elements is divided by. Nothing broadcasts, unless the docstring says so.
"""

from funcnet import reference as _reference
from funcnet.losses.auxiliaries import (
    auxiliary as auxiliary,
)
from funcnet.losses.binary import (
    bce as bce,
    bce_with_logits as bce_with_logits,
    focal as focal,
    multilabel_soft_margin as multilabel_soft_margin,
)
from funcnet.losses.classification import (
    cross_entropy as cross_entropy,
    nll as nll,
)
from funcnet.losses.ctc import (
    ctc as ctc,
)
from funcnet.losses.divergence import (
    kl_div as kl_div,
)
from funcnet.losses.embeddings import (
    cosine_embedding as cosine_embedding,
    triplet_margin as triplet_margin,
    triplet_margin_with_distance as triplet_margin_with_distance,
)
from funcnet.losses.lift import (
    Elements as Elements,
    from_formulas as from_formulas,
    loss_of as loss_of,
    pointwise as pointwise,
)
from funcnet.losses.likelihood import (
    gaussian_nll as gaussian_nll,
    poisson_nll as poisson_nll,
)
from funcnet.losses.margins import (
    hinge as hinge,
    hinge_embedding as hinge_embedding,
    margin_ranking as margin_ranking,
    multi_margin as multi_margin,
    multilabel_margin as multilabel_margin,
    soft_margin as soft_margin,
)
from funcnet.losses.regression import (
    huber as huber,
    mae as mae,
    mse as mse,
    smooth_l1 as smooth_l1,
)

__docformat__ = "google"
__doc__ = _reference.described(__name__, __doc__)
__all__ = _reference.names(__name__)
