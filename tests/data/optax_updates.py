"""Print what optimizers of optax do, as JSON, for tests/optimizers/test_optax.py to compare with.

Run it in an environment with jax and optax, from the root of the repository:

    python tests/data/optax_updates.py > tests/data/optax_updates.json

Every case is a list of the params after each step, in float64, with gradients that depend on the
params; those of schedule-free optimizers also have the params to evaluate with. `gradients` and
`hessian` are repeated in the test.
"""

import json

import jax
import jax.numpy as jnp
import optax
from optax import contrib

STEPS = 12


def params():
    return {
        "w": jnp.array([[0.5, -1.25, 2.0], [0.0, 3.5, -0.75]]),
        "b": jnp.array([1.5, -0.5]),
        "zero": jnp.zeros((2,)),
        "scale": jnp.array(1.75),
    }


def gradients(step, tree):
    """A gradient for every leaf, of which some elements change their signs."""
    return jax.tree.map(lambda p: jnp.sin(3.0 * p + step) + 0.1 * p, tree)


def hessian(step, tree):
    """For Sophia: an estimate of the Hessian's diagonal."""
    return jax.tree.map(lambda p: 50.0 * jnp.cos(p + step) + 20.0, tree)


def given_hessian():
    """The estimate of Sophia as an optax transform; it is made at every third step."""

    def update(updates, state, params=None, **options):
        del updates, options
        return hessian(state, params), state + 3

    return optax.GradientTransformationExtraArgs(lambda p: jnp.zeros([], jnp.int32), update)


def falling(step):
    return 0.1 / (1.0 + step)


def warmed_up(steps):
    """optax's own warm-up, in float64: it computes its in float32."""
    return lambda step: 0.1 * jnp.minimum(step.astype(jnp.float64) / steps, 1.0)


def sophia(**options):
    return contrib.sophia(hessian_diagonal_fn=given_hessian(), update_interval=3, **options)


CASES = {
    "lion": lambda: optax.lion(0.01),
    "lion options": lambda: optax.lion(falling, b1=0.7, b2=0.9, weight_decay=0.1),
    "lamb": lambda: optax.lamb(0.01),
    "lamb options": lambda: optax.lamb(falling, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.1),
    "lars": lambda: optax.lars(0.1),
    "lars options": lambda: optax.lars(
        falling, weight_decay=0.1, trust_coefficient=0.02, eps=0.01, momentum=0.8, nesterov=True
    ),
    "trust ratio": lambda: optax.chain(
        optax.scale_by_trust_ratio(min_norm=1.9, trust_coefficient=0.5, eps=0.1), optax.scale(-0.1)
    ),
    "schedule-free sgd": lambda: contrib.schedule_free_sgd(0.1),
    "schedule-free sgd options": lambda: contrib.schedule_free_sgd(
        warmed_up(4), b1=0.8, weight_decay=0.1, weight_lr_power=1.0
    ),
    "schedule-free adamw": lambda: contrib.schedule_free_adamw(0.1),
    "schedule-free adamw options": lambda: contrib.schedule_free_adamw(
        warmed_up(5), b1=0.95, b2=0.9, eps=1e-3, weight_decay=0.1, weight_lr_power=1.5
    ),
    "schedule-free momentum": lambda: contrib.schedule_free(optax.rmsprop(0.05), 0.05, b1=0.7),
    "schedule-free schedule": lambda: contrib.schedule_free(optax.sgd(falling), falling, b1=0.9),
    "sophia": lambda: sophia(learning_rate=0.01),
    "sophia options": lambda: sophia(
        learning_rate=falling, b1=0.8, b2=0.9, eps=1e-2, weight_decay=0.1, gamma=0.05,
        clip_threshold=0.5,
    ),
    "sophia without a limit": lambda: sophia(
        learning_rate=0.01, eps=0.1, gamma=0.1, clip_threshold=None
    ),
}  # fmt: skip


def leaves(tree):
    return {name: leaf.tolist() for name, leaf in tree.items()}


def run(optimizer):
    tree = params()
    state = optimizer.init(tree)
    rows = []
    for step in range(STEPS):
        updates, state = optimizer.update(gradients(step, tree), state, tree)
        tree = optax.apply_updates(tree, updates)
        rows.append({"params": leaves(tree)})
        if isinstance(state, contrib.ScheduleFreeState):
            rows[-1]["eval"] = leaves(contrib.schedule_free_eval_params(state, tree))
    return rows


def main():
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    lines = [
        f'"optax": {json.dumps(optax.__version__)}',
        f'"params": {json.dumps(leaves(params()))}',
    ]
    for name, make in CASES.items():
        rows = ",\n".join(json.dumps(row) for row in run(make()))
        lines.append(f"{json.dumps(name)}: [\n{rows}\n]")
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main()
