"""Metrics: pure accumulators over the batches of a data set, and over the ranks of a run.

A `Metric` is three pure functions, ``(init, update, value)``. What it accumulates, ``acc``, is a
dict of tensors that are sums over the examples, counts in int64 and sums in float64; so those of
two parts of the data, of the members of a population or of the ranks of a run add up:

>>> import funcnet as fn
>>> accuracy = fn.metrics.accuracy()
>>> prediction, target = torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0])
>>> one = accuracy.update(accuracy.init(), prediction, target)
>>> both = fn.tree.map(torch.add, one, accuracy.update(accuracy.init(), prediction, 1 - target))
>>> accuracy.value(one), accuracy.value(both), both["count"]
(tensor(0.5000, dtype=torch.float64), tensor(0.5000, dtype=torch.float64), tensor(4))

Across ranks, ``torch.distributed.all_reduce`` adds up each tensor of ``acc``. The value is that of
all examples at once, not a mean over batches. Nothing waits for a device, and all works under
`funcnet.jit`, `funcnet.scan` and `funcnet.vmap`. `funcnet.evaluate` runs metrics over a data set,
and `funcnet.train_step` gives their values for each batch.

Classes are predicted by scores, such as logits, of shape (batch, classes, *), for targets of
int64 class indices of shape (batch, *), as `funcnet.losses.cross_entropy` takes them; or by one
number above or below a threshold, of the target's shape; or they are given as integers.

``update`` also takes a ``mask`` of examples after the target; see `masked`. Options have the names
that they have in scikit-learn and torchmetrics.
"""

from funcnet import reference as _reference
from funcnet.metrics.classes import (
    accuracy as accuracy,
    confusion_matrix as confusion_matrix,
    top_k_accuracy as top_k_accuracy,
)
from funcnet.metrics.core import (
    Metric as Metric,
    masked as masked,
    summed as summed,
)
from funcnet.metrics.means import (
    mean as mean,
    mean_absolute_error as mean_absolute_error,
    mean_squared_error as mean_squared_error,
    perplexity as perplexity,
    r2 as r2,
)
from funcnet.metrics.ranking import (
    auroc as auroc,
)
from funcnet.metrics.retrieval import (
    f1 as f1,
    fbeta as fbeta,
    precision as precision,
    recall as recall,
)

__docformat__ = "google"
__doc__ = _reference.described(__name__, __doc__)
__all__ = _reference.names(__name__)
