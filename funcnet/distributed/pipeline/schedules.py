"""In which order the stages of a pipeline work on the parts of a batch: schedules by name."""

from funcnet.distributed.pipeline.actions import Action, Schedule
from funcnet.errors import check_count


def gpipe(stages: int, micro_batches: int) -> Schedule:
    """All forward passes, then all backward passes.

    A stage holds the activations of all micro-batches. With the costs F, B and W of the passes a
    stage idles for ``(stages - 1) (F + B + W)``.

    Args:
        stages: how many, at least 1.
        micro_batches: into how many parts the batch is cut, at least 1.

    Returns:
        a tuple of the actions of each stage; see `Action`.

    Source: Huang et al. 2019, "GPipe".

    >>> gpipe(2, 2)
    ((F0, F1, BW0, BW1), (F0, F1, BW0, BW1))
    """
    check_count("gpipe", stages=stages, micro_batches=micro_batches)
    forward = tuple([Action("F", index) for index in range(micro_batches)])
    backward = tuple([Action("BW", index) for index in range(micro_batches)])
    return (forward + backward,) * stages


def one_f_one_b(stages: int, micro_batches: int) -> Schedule:
    """1F1B: after the first forward passes, one backward and one forward pass in turn.

    The idle time is that of `gpipe`, but stage s holds the activations of at most
    ``stages - s`` micro-batches.

    Args:
        stages: how many, at least 1.
        micro_batches: into how many parts the batch is cut, at least 1.

    Returns:
        a tuple of the actions of each stage; see `Action`.

    Source: Narayanan et al. 2019, "PipeDream", with the gradients of one step, as in Narayanan
    et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters".

    >>> one_f_one_b(2, 3)
    ((F0, F1, BW0, F2, BW1, BW2), (F0, BW0, F1, BW1, F2, BW2))
    """
    check_count("one_f_one_b", stages=stages, micro_batches=micro_batches)
    schedule = []
    for stage in range(stages):
        ahead = min(stages - stage, micro_batches)
        actions = [Action("F", index) for index in range(ahead)]
        for index in range(micro_batches):
            actions.append(Action("BW", index))
            if index + ahead < micro_batches:
                actions.append(Action("F", index + ahead))
        schedule.append(tuple(actions))
    return tuple(schedule)


def zero_bubble(stages: int, micro_batches: int, *, held: int | None = None) -> Schedule:
    """The backward pass in two halves: gradients of params fill the time in which a stage waits.

    It is the order of `one_f_one_b`, but the stage before gets its cotangent as soon as it is
    there, and the gradients of the stage's params come when ``held`` activations are reached. With
    the costs F, B and W of the passes it idles for ``(stages - 1) (F + B - W)``, so with equal
    costs for a third of the time of `one_f_one_b`.

    Args:
        stages: how many, at least 1.
        micro_batches: into how many parts the batch is cut, at least 1.
        held: of how many micro-batches a stage may hold activations, from the forward pass to the
            gradients. Default ``stages``, the most that a stage of `one_f_one_b` holds: ZB-H1.
            Each one more is a forward pass less to wait for; with ``2 stages - 1``, ZB-H2, and
            equal costs no stage waits between its first action and its last.

    Returns:
        a tuple of the actions of each stage; see `Action`.

    Source: Qi et al. 2023, "Zero Bubble Pipeline Parallelism".

    >>> zero_bubble(2, 3)
    ((F0, F1, B0, W0, F2, B1, W1, B2, W2), (F0, B0, F1, B1, W0, F2, B2, W1, W2))
    """
    check_count("zero_bubble", stages=stages, micro_batches=micro_batches)
    most = stages if held is None else held
    check_count("zero_bubble", held=most)
    schedule = []
    for stage in range(stages):
        later = stages - 1 - stage
        ahead = min(later + 1 + min(max(most - stages, 0), later), most)
        # A stage that holds fewer for its forward passes lets its gradients wait for longer.
        behind = most - ahead
        actions = [Action("F", index) for index in range(min(ahead, micro_batches))]
        for index in range(micro_batches):
            actions.append(Action("B", index))
            if index >= behind:
                actions.append(Action("W", index - behind))
            if index + ahead < micro_batches:
                actions.append(Action("F", index + ahead))
        left = range(max(micro_batches - behind, 0), micro_batches)
        schedule.append((*actions, *[Action("W", index) for index in left]))
    return tuple(schedule)
