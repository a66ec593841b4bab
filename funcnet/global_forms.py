"""Layers that compute, of a rank's part of a batch, what they would of the whole batch."""

from collections.abc import Mapping

from funcnet.batch_axis import BatchAxis
from funcnet.core import Layer, join_paths, place_of, rebuilt
from funcnet.errors import located, require


def in_global_form(layer: Layer, axis: BatchAxis, path: str = "") -> Layer:
    """A model whose layers that draw numbers or mix examples are in their global form.

    Args:
        layer: any layer.
        axis: the ranks that have the parts of the batch.
        path: the dotted path of its params, for errors.

    Raises:
        ValueError: a layer that has no such form.

    >>> import funcnet as fn
    >>> axis = BatchAxis("data", 2, "data of (data=2)")
    >>> in_global_form(fn.serial(fn.linear(3), fn.clip_cotangent(1.0)), axis)
    Traceback (most recent call last):
    ...
    ValueError: clip_cotangent at '1' mixes the examples of a batch, and has no global form; ...
    """
    where = place_of(layer, path)
    if layer.global_form is not None:
        with located(f"{where}:"):
            made = layer.global_form(axis)
        made.call = layer.call
        return made
    children = layer.children.values()
    draws = layer.takes_key and not any([child.takes_key for child in children])
    what = "draws random numbers" if draws else "mixes the examples of a batch"
    hint = "; functions around a layer that has one go around data_parallel(model)"
    none = not draws and not layer.mixes_itself
    require(none, f"{where} {what}, and has no global form{hint}")
    forms = all_in_global_form(layer.children, axis, path)
    if all([forms[name] is child for name, child in layer.children.items()]):
        return layer
    require(layer.rebuild, f"{where} cannot be rebuilt of its layers in global form")
    return rebuilt(layer, forms)


def all_in_global_form(
    layers: Mapping[str, Layer], axis: BatchAxis, path: str = ""
) -> dict[str, Layer]:
    """Several layers in their global forms, by name; see `in_global_form`."""
    return {
        name: in_global_form(layer, axis, join_paths(path, name)) for name, layer in layers.items()
    }
