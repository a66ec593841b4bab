"""Pipelines: the layers of a model on the ranks of an axis, and the batch in parts."""

from funcnet.distributed.pipeline.actions import Action as Action, Schedule as Schedule
from funcnet.distributed.pipeline.evaluation import pipeline_evaluate as pipeline_evaluate
from funcnet.distributed.pipeline.schedules import (
    gpipe as gpipe,
    one_f_one_b as one_f_one_b,
    zero_bubble as zero_bubble,
)
from funcnet.distributed.pipeline.simulation import Simulation as Simulation, simulate as simulate
from funcnet.distributed.pipeline.stages import pipeline_stages as pipeline_stages
from funcnet.distributed.pipeline.step import (
    pipeline_state as pipeline_state,
    pipeline_step as pipeline_step,
)
