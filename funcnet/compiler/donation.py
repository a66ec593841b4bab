"""Which donated argument's memory each result takes."""

from collections.abc import Sequence

from torch.fx import Node

from funcnet.compiler.specs import Spec, spec_of


def pair(
    outputs: Sequence[Node], inputs: Sequence[Node], donated: list[int], passed: dict[int, int]
) -> dict[int, int]:
    """The donated input whose memory each output takes: of those like it the nearest in the graph.

    So each part of a training state takes its own place, whatever the order of the results.
    """
    source_of = {inputs[source]: source for source in donated}
    specs = {node: spec_of(node.meta["val"]) for node in (*source_of, *outputs)}
    free = dict.fromkeys(donated)
    near = [
        (distance, index, source)
        for index, node in enumerate(outputs)
        if index not in passed
        for distance, source in _sources(node, source_of, specs)
    ]
    pairs: dict[int, int] = {}
    for _, index, source in sorted(near):
        if index not in pairs and source in free:
            pairs[index] = source
            del free[source]
    for index, node in enumerate(outputs):
        if index not in passed and index not in pairs:
            like = next((each for each in free if specs[inputs[each]] == specs[node]), None)
            if like is not None:
                pairs[index] = like
                del free[like]
    return pairs


_NEAR = 64
"""So many nodes are looked at for an input that an output was computed from."""


def _sources(
    output: Node, source_of: dict[Node, int], specs: dict[Node, Spec]
) -> list[tuple[int, int]]:
    """The donated inputs like an output that it is computed from, and how far away they are."""
    found, seen, level = [], {output}, [output]
    distance = 0
    while level and len(seen) < _NEAR:
        following = []
        for node in level:
            source = source_of.get(node)
            if source is not None and specs[node] == specs[output]:
                found.append((distance, source))
            fresh = [each for each in node.all_input_nodes if each not in seen]
            seen.update(fresh)
            following += fresh
        level, distance = following, distance + 1
    return found
