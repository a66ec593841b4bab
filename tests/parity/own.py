"""Our own cases: each class of torch.nn with each of its options, whether module_db has it or not.

To add one, write a line into a table of `own_windows`, `own_layers` or `own_losses`: the arguments
as torch takes them, and the shapes of the inputs.
"""

from tests.parity.draws import Case
from tests.parity.own_layers import LAYERS
from tests.parity.own_losses import LOSSES
from tests.parity.own_windows import WINDOWS

OWN: dict[str, list[Case]] = {**WINDOWS, **LAYERS, **LOSSES}
