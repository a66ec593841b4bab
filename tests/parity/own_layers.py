"""Our own cases of the other layers: features, norms, activations, noise, embeddings, shapes."""

from tests.parity.draws import Case, case, each, fixed, integers, normal
from tests.parity.own_windows import images

ROWS = (5, 6)
SHAPES = [ROWS, (4,), (2, 3, 4, 5), (0, 3)]


def activation(*args: float, **kwargs: float) -> list[Case]:
    return [case(*args, x=x, **kwargs) for x in SHAPES]


def batch_norms(dims: int, lazy: bool = False) -> list[Case]:
    shapes = [images(dims), ROWS] if dims == 1 else [images(dims)]
    found = []
    for x in shapes:
        size = () if lazy else (x[1],)
        found += each(
            *size,
            x=x,
            together=2,
            eps=[1e-3],
            momentum=[0.3, None],
            affine=[False],
            track_running_stats=[False],
            bias=[False],
        )
        found.append(case(*size, 1e-2, 0.5, True, False, x=x))
    return found


def instance_norms(dims: int, lazy: bool = False) -> list[Case]:
    x = images(dims)
    size = () if lazy else (x[1],)
    found = each(
        *size,
        x=x,
        together=2,
        eps=[1e-3],
        momentum=[0.3],
        affine=[True],
        track_running_stats=[True],
    )
    return [
        *found,
        case(*size, 1e-2, 0.5, True, True, x=x),
        case(*size, affine=True, bias=False, x=x),
        case(*size, affine=True, x=x[1:]),
        case(*size, track_running_stats=True, x=x[1:]),
    ]


def softmaxes() -> list[Case]:
    return [case(dim, x=x) for x in (ROWS, (2, 3, 4)) for dim in range(-2, len(x))]


def noises(x: tuple[int, ...]) -> list[Case]:
    return [case(x=x), *[case(p, x=x) for p in (0.0, 0.3, 1.0)]]


NORMS = {
    **{f"BatchNorm{dims}d": batch_norms(dims) for dims in (1, 2, 3)},
    **{f"LazyBatchNorm{dims}d": batch_norms(dims, lazy=True)[:6] for dims in (1, 2, 3)},
    **{f"InstanceNorm{dims}d": instance_norms(dims) for dims in (1, 2, 3)},
    **{f"LazyInstanceNorm{dims}d": instance_norms(dims, lazy=True)[:6] for dims in (1, 2, 3)},
    "GroupNorm": [
        *each(2, 4, x=images(2), together=2, eps=[1e-3], affine=[False], bias=[False]),
        *[case(groups, 4, 1e-3, x=images(1)) for groups in (1, 4)],
        case(3, 6, x=ROWS),
        case(2, 4, 1e-3, False, x=images(3)),
    ],
    "LayerNorm": [
        *each(6, x=ROWS, together=2, eps=[1e-3], elementwise_affine=[False], bias=[False]),
        case((7, 6), 1e-3, True, False, x=images(2)),
        case(images(2)[1:], x=images(2)),
        case(4, x=(4,)),
    ],
    "RMSNorm": [
        *each(6, x=ROWS, together=2, eps=[1e-3], elementwise_affine=[False]),
        case((7, 6), 1e-3, False, x=images(2)),
        case(images(2)[1:], x=images(2)),
        case(4, x=(4,)),
    ],
    "LocalResponseNorm": [
        *each(3, x=(2, 5, 4), together=2, alpha=[0.1], beta=[0.5], k=[2.0]),
        case(2, 0.2, 0.6, 1.5, x=images(2)),
        case(4, x=images(3)),
        case(1, 0.3, x=images(2)[:2] + (3,)),
    ],
    "CrossMapLRN2d": [
        *each(3, x=images(2), alpha=[0.1], beta=[0.5], k=[2.0]),
        case(5, 0.2, 0.6, 1.5, x=images(2)),
    ],
}

FEATURES = {
    "Linear": [
        case(6, 3, x=ROWS),
        case(6, 3, False, x=ROWS),
        case(4, 2, x=(4,)),
        case(5, 3, x=(2, 3, 4, 5)),
        case(6, 3, x=(0, 6)),
    ],
    "LazyLinear": [case(3, x=ROWS), case(3, False, x=(2, 3, 4))],
    "Bilinear": [
        case(6, 4, 3, x=[ROWS, (5, 4)]),
        case(6, 4, 3, False, x=[ROWS, (5, 4)]),
        case(3, 2, 5, x=[(3,), (2,)]),
        case(3, 2, 5, x=[(2, 4, 3), (2, 4, 2)]),
    ],
    "CosineSimilarity": [
        case(x=[ROWS, ROWS]),
        *[case(dim, x=[(2, 3, 4), (2, 3, 4)]) for dim in (0, 1, -1)],
        case(0, 1e-3, x=[(4,), (4,)]),
        case(1, 10.0, x=[ROWS, ROWS]),
        case(1, x=[(1, 6), ROWS]),
    ],
    "PairwiseDistance": [
        *each(x=[ROWS, ROWS], together=2, p=[1.0, 3.0], eps=[1e-3], keepdim=[True]),
        case(2.0, 1e-6, True, x=[(6,), (6,)]),
        case(float("inf"), x=[ROWS, ROWS]),
        case(x=[(6,), ROWS]),
    ],
    "Identity": [case(x=ROWS), case(x=images(2))],
    "Flatten": [case(x=images(2)), case(2, x=images(2)), case(0, 1, x=images(2)), case(0, x=(4,))],
    "Unflatten": [
        case(1, (2, 3), x=ROWS),
        case(-1, (2, -1), x=ROWS),
        case(0, [2, 1], x=(2, 3)),
    ],
}

BAGS = [integers(5, 7), fixed([0, 2, 2, 5])]
EMBEDDINGS = {
    "Embedding": [
        *each(
            5,
            3,
            x=integers(5, 4, 2),
            together=2,
            padding_idx=[1, -1],
            max_norm=[1.0],
            norm_type=[1.0],
            scale_grad_by_freq=[True],
        ),
        case(5, 3, 2, 1.5, 1.0, True, x=integers(5, 4)),
        case(5, 3, sparse=True, x=integers(5, 4)),
        case(5, 3, x=integers(5)),
        case(5, 3, x=integers(5, 0, 2)),
    ],
    "EmbeddingBag": [
        *each(
            5,
            3,
            x=integers(5, 4, 2),
            together=2,
            mode=["sum", "max"],
            padding_idx=[1],
            max_norm=[1.0],
            norm_type=[1.0],
        ),
        *[case(5, 3, mode=mode, x=BAGS) for mode in ("sum", "mean", "max")],
        *[
            case(5, 3, mode=mode, include_last_offset=True, x=[integers(5, 7), fixed([0, 2, 2, 7])])
            for mode in ("sum", "mean", "max")
        ],
        *[case(5, 3, mode=mode, padding_idx=2, x=BAGS) for mode in ("sum", "mean", "max")],
        case(5, 3, mode="sum", x=[*BAGS, normal(7)]),
        case(5, 3, mode="sum", padding_idx=2, x=[*BAGS, normal(7)]),
        case(5, 3, mode="sum", x=[integers(5, 4, 2), None, normal(4, 2)]),
        case(5, 3, None, 2.0, True, x=BAGS),
        case(5, 3, mode="sum", scale_grad_by_freq=True, x=integers(5, 4, 2)),
        case(5, 3, sparse=True, x=BAGS),
    ],
}

ACTIVATIONS = {
    **{
        name: activation()
        for name in ("ReLU", "ReLU6", "SELU", "SiLU", "Mish", "Sigmoid", "LogSigmoid", "Tanh")
    },
    **{name: activation() for name in ("Tanhshrink", "Softsign", "Hardsigmoid", "Hardswish")},
    "LeakyReLU": [*activation(), *activation(0.3)],
    "PReLU": [
        *activation(),
        case(6, x=ROWS),
        case(4, 0.1, x=images(2)),
        case(init=0.7, x=ROWS),
    ],
    "ELU": [*activation(), *activation(0.6)],
    "CELU": [*activation(), *activation(0.6)],
    "GELU": [*activation(), *activation(approximate="tanh")],
    "GLU": [case(x=ROWS), case(0, x=(4, 3)), case(1, x=images(2))],
    "Hardtanh": [*activation(), *activation(-0.3, 0.8)],
    "Hardshrink": [*activation(), *activation(0.2)],
    "Softshrink": [*activation(), *activation(0.2)],
    "Softplus": [*activation(), *activation(2.0, 0.5), *activation(threshold=1.0)],
    "Threshold": activation(0.1, -2.0),
    "RReLU": [*activation(), *activation(0.2, 0.4), *activation(0.3, 0.3)],
    "Softmax": softmaxes(),
    "Softmin": softmaxes(),
    "LogSoftmax": softmaxes(),
    "Softmax2d": [case(x=images(2)), case(x=images(2)[1:])],
    "Dropout": [*noises(ROWS), *noises(images(2))],
    "AlphaDropout": noises(ROWS),
    "Dropout1d": [*noises(images(1)), *noises(images(1)[1:])],
    "Dropout2d": [*noises(images(2)), *noises(images(2)[1:])],
    "Dropout3d": [*noises(images(3)), *noises(images(3)[1:])],
    "FeatureAlphaDropout": [*noises(images(2)), *noises(images(3))],
}

LAYERS = {**FEATURES, **NORMS, **EMBEDDINGS, **ACTIVATIONS}
