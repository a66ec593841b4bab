"""The bridge to PyTorch and other libraries: modules, their tensors, and exported programs."""

from funcnet import reference as _reference
from funcnet.interop.arrays import (
    from_dlpack as from_dlpack,
    from_numpy as from_numpy,
    to_dlpack as to_dlpack,
    to_numpy as to_numpy,
)
from funcnet.interop.differentiated import (
    autodiff as autodiff,
)
from funcnet.interop.exported import (
    export as export,
)
from funcnet.interop.from_torch import (
    from_module as from_module,
)
from funcnet.interop.layer_module import (
    to_module as to_module,
)
from funcnet.interop.state_dicts import (
    from_state_dict as from_state_dict,
    to_state_dict as to_state_dict,
)

__docformat__ = "google"
__doc__ = _reference.described(__name__, __doc__)
__all__ = _reference.names(__name__)
