"""Optimizers, the transforms they are chained from, and what lifts a formula to one."""

from funcnet.optimizers.adaptive import (
    AdamState as AdamState,
    RmsState as RmsState,
    scale_by_adam as scale_by_adam,
    scale_by_rms as scale_by_rms,
)
from funcnet.optimizers.chains import chain as chain
from funcnet.optimizers.lift import (
    apply_updates as apply_updates,
    around as around,
    stateful as stateful,
    stateless as stateless,
    zero_step as zero_step,
)
from funcnet.optimizers.masked import (
    masked as masked,
    partition as partition,
)
from funcnet.optimizers.optimizers import (
    adam as adam,
    adamw as adamw,
    rmsprop as rmsprop,
    sgd as sgd,
    signsgd as signsgd,
)
from funcnet.optimizers.transforms import (
    ScheduleState as ScheduleState,
    TraceState as TraceState,
    add_decayed_weights as add_decayed_weights,
    negate as negate,
    scale as scale,
    scale_by_learning_rate as scale_by_learning_rate,
    scale_by_sign as scale_by_sign,
    trace as trace,
)
