"""Checkpoints: `save` and `load` of trees of tensors, and a folder of the last ones of a run."""

from funcnet import reference as _reference
from funcnet.checkpoint.folder import (
    RunFolder as RunFolder,
    best as best,
    latest as latest,
    run_folder as run_folder,
    save_step as save_step,
    steps as steps,
)
from funcnet.checkpoint.loading import load as load
from funcnet.checkpoint.saving import save as save

__docformat__ = "google"
__doc__ = _reference.described(__name__, __doc__)
__all__ = _reference.names(__name__)
