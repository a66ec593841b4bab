"""Optimizers, the transforms they are chained from, and what lifts a formula to one."""

from funcnet.optimizers.adaptive import AdamState as AdamState
from funcnet.optimizers.adaptive import RmsState as RmsState
from funcnet.optimizers.adaptive import scale_by_adam as scale_by_adam
from funcnet.optimizers.adaptive import scale_by_rms as scale_by_rms
from funcnet.optimizers.chains import chain as chain
from funcnet.optimizers.lift import apply_updates as apply_updates
from funcnet.optimizers.lift import stateful as stateful
from funcnet.optimizers.lift import stateless as stateless
from funcnet.optimizers.lift import zero_step as zero_step
from funcnet.optimizers.optimizers import adam as adam
from funcnet.optimizers.optimizers import adamw as adamw
from funcnet.optimizers.optimizers import rmsprop as rmsprop
from funcnet.optimizers.optimizers import sgd as sgd
from funcnet.optimizers.optimizers import signsgd as signsgd
from funcnet.optimizers.transforms import ScheduleState as ScheduleState
from funcnet.optimizers.transforms import TraceState as TraceState
from funcnet.optimizers.transforms import add_decayed_weights as add_decayed_weights
from funcnet.optimizers.transforms import negate as negate
from funcnet.optimizers.transforms import scale as scale
from funcnet.optimizers.transforms import scale_by_learning_rate as scale_by_learning_rate
from funcnet.optimizers.transforms import scale_by_sign as scale_by_sign
from funcnet.optimizers.transforms import trace as trace
