"""Optimizers of some of the leaves: `masked` and `partition`, by path."""

from collections.abc import Collection, Mapping
from typing import Any

from funcnet import tree
from funcnet.checks import check_kind
from funcnet.core import EMPTY, Optimizer, Params, Tree
from funcnet.errors import located, require
from funcnet.optimizers.chains import check_states, present
from funcnet.optimizers.leaves import Leaves
from funcnet.optimizers.lift import leaves_update, lifted
from funcnet.optimizers.param_trees import Trees
from funcnet.optimizers.parts import Parts, some_of
from funcnet.tree import Where, chosen_leaves


def masked(optimizer: Optimizer, where: Where, *, name: str = "masked") -> Optimizer:
    """An optimizer of some of the leaves; the gradients of the others pass as they are.

    Args:
        optimizer: of the chosen leaves; it does not see the others.
        where: chooses the leaves: a function of the dotted path, or the path of a leaf or of a
            layer, or several, as for `funcnet.freeze`.
        name: what errors and a chain's state call it.

    State:
        that of the optimizer, for those leaves.
    Raises:
        ValueError: no leaf is chosen, or a path is of none.

    Source: ``optax.masked``.

    >>> no_bias = masked(fn.optimizers.add_decayed_weights(0.1), lambda path: "bias" not in path)
    >>> params = {"weight": torch.ones(1), "bias": torch.ones(1)}
    >>> no_bias.update(params, no_bias.init_state(params), params)[0]
    {'weight': tensor([1.1000]), 'bias': tensor([1.])}
    """
    check_kind(name, optimizer, Optimizer)
    inside = leaves_update(optimizer)

    parts = Parts(name, lambda paths: {"": chosen_leaves(where, paths) if paths else ()})

    def init_state(params: Params) -> Tree:
        part = parts(tree.flatten(params)[1])[""]
        with some_of(part.whole):
            return optimizer.init_state(part.of(params))

    def update_leaves(g: Leaves, opt_state: Tree, trees: Trees) -> tuple[Leaves, Tree]:
        part = parts(trees.treedef)[""]
        with located(name), some_of(part.whole):
            updates, opt_state = inside(part.take(g), opt_state, part.trees(trees))
        return part.put(updates, g.to_dtypes(trees.params)), opt_state

    told = {**optimizer.metadata, "needs_all_leaves": True}
    return lifted(name, init_state, update_leaves, **told)


def partition(optimizers: Mapping[str, Optimizer], rules: Mapping[str, Where]) -> Optimizer:
    """One optimizer for each of several parts of the params.

    Args:
        optimizers: by label.
        rules: for each label which leaves it has: a function of the dotted path, or the path of a
            leaf or of a layer, or several, as for `funcnet.freeze`. Each leaf must match exactly
            one rule.

    State:
        ``{label: state of the optimizer}``, without those that have none.
    Raises:
        ValueError: a leaf that no rule or two rules match, a path that is of no leaf, and
            labels without an optimizer or a rule.

    Source: ``optax.partition``; the parameter groups of torch.optim.

    >>> def in_head(path): return path.startswith("head")
    >>> slow_body = partition(
    ...     {"body": fn.sgd(0.01), "head": fn.sgd(0.1)}, {"body": "body", "head": in_head})
    >>> params = {"body": {"weight": torch.ones(1)}, "head": {"weight": torch.ones(1)}}
    >>> slow_body.update(params, slow_body.init_state(params), params)[0]
    {'body': {'weight': tensor([-0.0100])}, 'head': {'weight': tensor([-0.1000])}}
    """
    for optimizer in optimizers.values():
        check_kind("partition", optimizer, Optimizer)
    without = sorted(optimizers.keys() ^ rules.keys())
    require(not without, f"partition: expects an optimizer and a rule for each label of {without}")

    def find(paths: Mapping[str, Any]) -> dict[str, Collection[str]]:
        found = {label: _meant(where, paths) for label, where in rules.items()}
        for path in paths:
            by = [label for label, meant in found.items() if path in meant]
            which = f"the rules {by} match" if by else f"no rule of {list(rules)} matches"
            require(len(by) == 1, f"{which} the leaf {path!r}; exactly one must")
        return found

    parts = Parts("partition", find)
    updates_of = {label: leaves_update(each) for label, each in optimizers.items()}

    def init_state(params: Params) -> Params:
        found, states = parts(tree.flatten(params)[1]), {}
        for label, each in optimizers.items():
            with some_of(found[label].whole):
                states[label] = each.init_state(found[label].of(params))
        return present(states)

    def update_leaves(g: Leaves, opt_state: Params, trees: Trees) -> tuple[Leaves, Params]:
        check_states("partition", optimizers, opt_state)
        found, states, result = parts(trees.treedef), {}, Leaves([*g], True)
        for label, update in updates_of.items():
            part = found[label]
            with located(f"partition[{label!r}]"), some_of(part.whole):
                updates, states[label] = update(
                    part.take(g), opt_state.get(label, EMPTY), part.trees(trees)
                )
            result = part.put(updates, result)
        return result, present(states)

    elementwise = all([each.elementwise for each in optimizers.values()])
    reduces = tuple([pair for each in optimizers.values() for pair in each.reduces])
    return lifted("partition", init_state, update_leaves, True, elementwise, reduces)


def _meant(where: Where, paths: Mapping[str, Any]) -> Collection[str]:
    """The leaves that a rule matches; a function may match none."""
    if callable(where):
        return [path for path in paths if where(path)]
    return chosen_leaves(where, paths) if paths else ()
