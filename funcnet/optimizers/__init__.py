"""Optimizers, the transforms they are chained from, and what lifts a formula to one.

Those that torch.optim has take its options, in its order, with its defaults, but for those that
choose among PyTorch's implementations: ``foreach``, ``fused``, ``differentiable`` and
``capturable`` are no options here. Counts of updates are tensors that no update reads, as with
``capturable=True``, and every update can be differentiated.
"""

from funcnet import reference as _reference
from funcnet.optimizers import (
    schedules as schedules,
)
from funcnet.optimizers.adadelta import (
    AdadeltaState as AdadeltaState,
    adadelta as adadelta,
    scale_by_adadelta as scale_by_adadelta,
)
from funcnet.optimizers.adafactor import (
    FactoredState as FactoredState,
    adafactor as adafactor,
    scale_by_factored_rms as scale_by_factored_rms,
)
from funcnet.optimizers.adagrad import (
    AdagradState as AdagradState,
    adagrad as adagrad,
    scale_by_adagrad as scale_by_adagrad,
)
from funcnet.optimizers.adam import (
    AdamState as AdamState,
    adam as adam,
    adamw as adamw,
    scale_by_adam as scale_by_adam,
)
from funcnet.optimizers.adamax import (
    AdamaxState as AdamaxState,
    adamax as adamax,
    scale_by_adamax as scale_by_adamax,
)
from funcnet.optimizers.asgd import (
    AsgdState as AsgdState,
    asgd as asgd,
    average_asgd as average_asgd,
)
from funcnet.optimizers.averaging import (
    AveragedParamsState as AveragedParamsState,
    eval_params as eval_params,
    params_average as params_average,
    params_ema as params_ema,
)
from funcnet.optimizers.chains import (
    chain as chain,
)
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
from funcnet.optimizers.lbfgs import (
    LbfgsState as LbfgsState,
    Minimizer as Minimizer,
    lbfgs as lbfgs,
)
from funcnet.optimizers.lift import (
    apply_updates as apply_updates,
    around as around,
    stateful as stateful,
    stateless as stateless,
    zero_step as zero_step,
)
from funcnet.optimizers.loss_scale import (
    LossScaleState as LossScaleState,
    dynamic_loss_scale as dynamic_loss_scale,
)
from funcnet.optimizers.muon import (
    MuonState as MuonState,
    muon as muon,
    orthogonalize as orthogonalize,
    scale_by_muon as scale_by_muon,
)
from funcnet.optimizers.nadam import (
    NadamState as NadamState,
    nadam as nadam,
    scale_by_nadam as scale_by_nadam,
)
from funcnet.optimizers.parted import (
    masked as masked,
    partition as partition,
)
from funcnet.optimizers.radam import (
    RadamState as RadamState,
    radam as radam,
    scale_by_radam as scale_by_radam,
)
from funcnet.optimizers.rms import (
    RmsState as RmsState,
    rmsprop as rmsprop,
    scale_by_rms as scale_by_rms,
)
from funcnet.optimizers.rprop import (
    RpropState as RpropState,
    rprop as rprop,
    scale_by_rprop as scale_by_rprop,
)
from funcnet.optimizers.schedule_free import (
    ScheduleFreeState as ScheduleFreeState,
    average_schedule_free as average_schedule_free,
    schedule_free as schedule_free,
    schedule_free_adamw as schedule_free_adamw,
    schedule_free_sgd as schedule_free_sgd,
)
from funcnet.optimizers.sgd import (
    sgd as sgd,
)
from funcnet.optimizers.shampoo import (
    ShampooState as ShampooState,
    scale_by_shampoo as scale_by_shampoo,
    shampoo as shampoo,
)
from funcnet.optimizers.sign import (
    LionState as LionState,
    lion as lion,
    scale_by_lion as scale_by_lion,
    signsgd as signsgd,
)
from funcnet.optimizers.slow_params import (
    LookaheadState as LookaheadState,
    lookahead as lookahead,
)
from funcnet.optimizers.soap import (
    SoapState as SoapState,
    scale_by_soap as scale_by_soap,
    soap as soap,
)
from funcnet.optimizers.sophia import (
    SophiaState as SophiaState,
    gauss_newton_bartlett as gauss_newton_bartlett,
    hutchinson as hutchinson,
    refresh_hessian as refresh_hessian,
    scale_by_sophia as scale_by_sophia,
    sophia as sophia,
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
from funcnet.optimizers.trust import (
    lamb as lamb,
    lars as lars,
    scale_by_trust_ratio as scale_by_trust_ratio,
)

__docformat__ = "google"
__doc__ = _reference.described(__name__, __doc__)
__all__ = _reference.names(__name__)
