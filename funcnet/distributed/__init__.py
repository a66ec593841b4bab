"""Training on several processes, with torch.distributed: what is communicated is in the functions.

A transform in an optimizer's chain, a layer whose rule is a collective, a schedule of pullbacks.
"""

from funcnet import reference as _reference
from funcnet.batch_axis import BatchAxis as BatchAxis
from funcnet.distributed.checkpoints.loading import load as load
from funcnet.distributed.checkpoints.runs import (
    export as export,
    latest as latest,
    run_folder as run_folder,
    save_step as save_step,
)
from funcnet.distributed.checkpoints.saving import save as save
from funcnet.distributed.checkpoints.states import state_placements as state_placements
from funcnet.distributed.data.batches import part as part
from funcnet.distributed.data.global_batch import data_parallel as data_parallel
from funcnet.distributed.data.gradients import mean as mean, sum as sum
from funcnet.distributed.data.replicate import replicated as replicated
from funcnet.distributed.data.totals import everywhere as everywhere, total as total
from funcnet.distributed.pipeline import (
    Action as Action,
    Simulation as Simulation,
    gpipe as gpipe,
    one_f_one_b as one_f_one_b,
    pipeline_evaluate as pipeline_evaluate,
    pipeline_stages as pipeline_stages,
    pipeline_state as pipeline_state,
    pipeline_step as pipeline_step,
    simulate as simulate,
    zero_bubble as zero_bubble,
)
from funcnet.distributed.planning.layouts import Layout as Layout, Plans as Plans, plans as plans
from funcnet.distributed.planning.networks import (
    Device as Device,
    Link as Link,
    Network as Network,
    link_of as link_of,
)
from funcnet.distributed.planning.planned import (
    Memory as Memory,
    Plan as Plan,
    Stage as Stage,
    plan as plan,
)
from funcnet.distributed.planning.traffic import Traffic as Traffic
from funcnet.distributed.processes.faults import PeerError as PeerError
from funcnet.distributed.processes.sameness import check_same as check_same
from funcnet.distributed.processes.start import (
    axis_of as axis_of,
    finalize as finalize,
    initialize as initialize,
    mesh as mesh,
)
from funcnet.distributed.sharding.sharded_layers import sharded as sharded
from funcnet.distributed.sharding.sharded_optimizers import (
    ZeroState as ZeroState,
    zero as zero,
)
from funcnet.distributed.tensor_parallel.blocks import (
    parallel_encoder_layer as parallel_encoder_layer,
)
from funcnet.distributed.tensor_parallel.cross_entropy import (
    vocabulary_cross_entropy as vocabulary_cross_entropy,
)
from funcnet.distributed.tensor_parallel.heads import parallel_attention as parallel_attention
from funcnet.distributed.tensor_parallel.linears import (
    column_linear as column_linear,
    row_linear as row_linear,
)
from funcnet.distributed.tensor_parallel.pieces import (
    own_tokens as own_tokens,
    parted_dropout as parted_dropout,
)
from funcnet.distributed.tensor_parallel.vocabulary import (
    vocabulary_embedding as vocabulary_embedding,
)
from funcnet.optimizers.over_ranks import over_parts as over_parts
from funcnet.parted_params import placements as placements

__docformat__ = "google"
__doc__ = _reference.described(__name__, __doc__)
__all__ = _reference.names(__name__)
