"""Print what optax's schedules give, as JSON, for tests/optimizers/test_schedules.py.

Run it in an environment with optax, from the root of the repository:

    python tests/data/optax_schedules.py > tests/data/optax_schedules.json

Every case is ``{"ours": our name, "options": our options, "values": optax's, of steps from 0}``,
computed in float64.
"""

import json

import jax
import optax

STEPS = 26


def steps_of(points):
    return {int(step): scale for step, scale in points.items()}


def polynomial(lr, total_iters, power=1.0, end_value=0.0, transition_begin=0):
    return optax.polynomial_schedule(lr, end_value, power, total_iters, transition_begin)


def exponential(lr, gamma, transition_steps=1, **options):
    return optax.exponential_decay(lr, transition_steps, gamma, **options)


def piecewise_constant(init_value, boundaries_and_scales=None):
    return optax.piecewise_constant_schedule(init_value, boundaries_and_scales)


# Ours by name: optax's, of our options, and the rows of them.
ROWS = {
    "polynomial": (
        polynomial,
        [
            {"lr": 0.3, "total_iters": 10, "power": 2.0, "end_value": 0.1, "transition_begin": 4},
            {"lr": 0.1, "total_iters": 7, "power": 0.5, "end_value": 0.9},
            {"lr": 0.1, "total_iters": 30, "end_value": 0.9, "transition_begin": 3},
        ],
    ),
    "exponential": (
        exponential,
        [
            {"lr": 0.3, "gamma": 0.5, "transition_steps": 4},
            {"lr": 0.3, "gamma": 0.5, "transition_steps": 4, "staircase": True},
            {"lr": 0.3, "gamma": 0.8, "transition_begin": 5, "end_value": 0.1},
            {"lr": 0.3, "gamma": 1.3, "transition_steps": 2, "end_value": 0.9},
        ],
    ),
    "cosine_decay": (
        optax.cosine_decay_schedule,
        [
            {"init_value": 0.3, "decay_steps": 11},
            {"init_value": 0.3, "decay_steps": 20, "alpha": 0.2, "exponent": 1.7},
        ],
    ),
    "piecewise_constant": (
        piecewise_constant,
        [
            {"init_value": 0.3},
            {"init_value": 0.3, "boundaries_and_scales": {"12": 0.5, "5": 0.1, "20": 3.0}},
        ],
    ),
    "piecewise_interpolate": (
        optax.schedules.piecewise_interpolate_schedule,
        [
            {
                "interpolate_type": kind,
                "init_value": 0.3,
                "boundaries_and_scales": {"12": 0.5, "5": 0.1, "20": 3.0},
            }
            for kind in ("linear", "cosine")
        ],
    ),
    "warmup_constant": (
        optax.warmup_constant_schedule,
        [{"init_value": 0.1, "peak_value": 0.7, "warmup_steps": 6}],
    ),
    "warmup_cosine": (
        optax.warmup_cosine_decay_schedule,
        [
            {"init_value": 0.0, "peak_value": 0.7, "warmup_steps": 6, "decay_steps": 20},
            {
                "init_value": 0.1,
                "peak_value": 0.7,
                "warmup_steps": 0,
                "decay_steps": 15,
                "end_value": 0.05,
                "exponent": 2.0,
            },
        ],
    ),
    "warmup_exponential": (
        optax.warmup_exponential_decay_schedule,
        [
            {
                "init_value": 0.1,
                "peak_value": 0.7,
                "warmup_steps": 5,
                "transition_steps": 3,
                "decay_rate": 0.6,
                "transition_begin": 2,
                "staircase": staircase,
                "end_value": 0.2,
            }
            for staircase in (False, True)
        ],
    ),
    "sgdr": (
        optax.sgdr_schedule,
        [
            {
                "cosine_kwargs": [
                    {"init_value": 0.0, "peak_value": 0.7, "warmup_steps": 2, "decay_steps": 8},
                    {
                        "init_value": 0.1,
                        "peak_value": 0.5,
                        "warmup_steps": 3,
                        "decay_steps": 10,
                        "end_value": 0.05,
                    },
                ]
            }
        ],
    ),
}


def main():
    jax.config.update("jax_enable_x64", True)
    cases = []
    for ours, (make, rows) in ROWS.items():
        for options in rows:
            theirs = dict(options)
            if "boundaries_and_scales" in theirs:
                theirs["boundaries_and_scales"] = steps_of(theirs["boundaries_and_scales"])
            schedule = make(**theirs)
            values = [float(schedule(step)) for step in range(STEPS)]
            cases.append({"ours": ours, "options": options, "values": values})
    print("[")
    print(",\n".join(json.dumps(case) for case in cases))
    print("]")


if __name__ == "__main__":
    main()
