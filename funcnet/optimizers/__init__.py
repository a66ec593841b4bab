"""Optimizers, the transforms they are chained from, and what lifts a formula to one."""

from funcnet.optimizers.adaptive import (
    AdamState as AdamState,
    RmsState as RmsState,
    scale_by_adam as scale_by_adam,
    scale_by_rms as scale_by_rms,
)
from funcnet.optimizers.chains import chain as chain
from funcnet.optimizers.clipping import (
    adaptive_grad_clip as adaptive_grad_clip,
    clip as clip,
    clip_by_block_rms as clip_by_block_rms,
    clip_by_global_norm as clip_by_global_norm,
    normalize as normalize,
)
from funcnet.optimizers.control import (
    AccumulateState as AccumulateState,
    ApplyIfFiniteState as ApplyIfFiniteState,
    accumulate as accumulate,
    apply_if_finite as apply_if_finite,
)
from funcnet.optimizers.gradients import (
    NoiseState as NoiseState,
    add_noise as add_noise,
    centralize as centralize,
    set_to_zero as set_to_zero,
    zero_nans as zero_nans,
)
from funcnet.optimizers.hyperparams import (
    InjectHyperparamsState as InjectHyperparamsState,
    inject_hyperparams as inject_hyperparams,
)
from funcnet.optimizers.lift import (
    apply_updates as apply_updates,
    around as around,
    stateful as stateful,
    stateless as stateless,
    zero_step as zero_step,
)
from funcnet.optimizers.lookahead import (
    LookaheadState as LookaheadState,
    lookahead as lookahead,
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
    EmaState as EmaState,
    ScheduleState as ScheduleState,
    TraceState as TraceState,
    add_decayed_weights as add_decayed_weights,
    ema as ema,
    negate as negate,
    scale as scale,
    scale_by_learning_rate as scale_by_learning_rate,
    scale_by_sign as scale_by_sign,
    trace as trace,
)
