"""The laws of the protocol as calls, for the library's layers and for one's own.

`check_layer`, `check_loss` and `check_optimizer` raise AssertionError with the law that is
broken, what it asks for, where, and by how much. They need nothing but torch and optree.
"""

from funcnet import reference as _reference
from funcnet.testing.layers import (
    check_layer as check_layer,
)
from funcnet.testing.losses import (
    check_loss as check_loss,
)
from funcnet.testing.optimizers import (
    check_optimizer as check_optimizer,
)

__docformat__ = "google"
__doc__ = _reference.described(__name__, __doc__)
__all__ = _reference.names(__name__)
