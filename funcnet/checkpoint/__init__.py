"""Checkpoints: `save` and `load` of trees of tensors, and a folder of the last ones of a run."""

from funcnet.checkpoint.loading import load as load
from funcnet.checkpoint.saving import save as save
from funcnet.checkpoint.steps import (
    best as best,
    latest as latest,
    save_step as save_step,
    steps as steps,
)
