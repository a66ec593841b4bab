"""The normalizations that came after the first two, for the tables of `cases`."""

import torch

import funcnet as fn


def draw(seed, *shape):
    return fn.random.normal(fn.key(seed), shape, torch.float64)


ROWS = draw(21, 5, 6)
IMAGES = draw(22, 2, 4, 3, 5)
VOLUMES = draw(23, 2, 4, 2, 3, 2)

LAYERS = {
    "batch_norm without bias": (fn.batch_norm(0.1, 0.3, bias=False), IMAGES),
    "rms_norm": (fn.rms_norm(), ROWS),
    "rms_norm of images": (fn.rms_norm((3, 5), 0.1), IMAGES),
    "rms_norm without params": (fn.rms_norm(elementwise_affine=False), ROWS),
    "group_norm": (fn.group_norm(2), IMAGES),
    "group_norm of rows": (fn.group_norm(3, 0.1, bias=False), ROWS),
    "group_norm without params": (fn.group_norm(1, affine=False), VOLUMES),
    "instance_norm": (fn.instance_norm(), IMAGES),
    "instance_norm with params": (fn.instance_norm(affine=True, bias=False), VOLUMES),
    "instance_norm with state": (fn.instance_norm(0.1, 0.3, True, True), IMAGES),
    "instance_norm1d": (fn.instance_norm1d(affine=True), ROWS),
    "instance_norm2d": (fn.instance_norm2d(0.1, 0.3, True, True), IMAGES[0]),
    "instance_norm3d": (fn.instance_norm3d(track_running_stats=True), VOLUMES[0]),
    "local_response_norm": (fn.local_response_norm(3, 0.5), IMAGES),
    "local_response_norm of an even size": (fn.local_response_norm(2, 0.5, 0.6, 2.0), VOLUMES),
    "cross_map_lrn": (fn.cross_map_lrn(3, 0.5), IMAGES),
}
