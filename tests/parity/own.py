"""Our own cases: each class of torch.nn with each of its options, whether module_db has it or not.

To add one, write a line into a table of the modules imported here: the arguments as torch takes
them, and the shapes of the inputs.
"""

from tests.parity.draws import Case
from tests.parity.own_attention import ATTENTION
from tests.parity.own_layers import LAYERS
from tests.parity.own_losses import HEADS, LOSSES
from tests.parity.own_recurrent import RECURRENT
from tests.parity.own_windows import WINDOWS

OWN: dict[str, list[Case]] = {**WINDOWS, **LAYERS, **RECURRENT, **ATTENTION}
OWN |= {**HEADS, **LOSSES}
