"""What a stage of a pipeline does, and which orders of it are schedules."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from funcnet.errors import require

KINDS = {
    "F": "forward",
    "B": "backward for the input",
    "W": "backward for the params",
    "BW": "backward for both",
}


class Action(NamedTuple):
    """What a stage does with one micro-batch.

    >>> Action("F", 0), Action("BW", 3)
    (F0, BW3)
    """

    kind: str
    """"F", the forward pass; "B", the backward pass for the input, which the stage before waits
    for; "W", that for the params, at any later time; or "BW", both at once."""

    micro_batch: int
    """Its index, from 0."""

    def __repr__(self) -> str:
        return f"{self.kind}{self.micro_batch}"


Schedule = tuple[tuple[Action, ...], ...]
"""For each stage its actions, in their order: plain data, which anything may make."""

Needed = tuple[int, str, int]
"""What another stage gives: its index, "F" or "B", and the micro-batch."""


def need(stages: int, stage: int, action: Action) -> Needed | None:
    """The result of another stage that an action waits for, if any.

    >>> need(2, 1, Action("F", 0)), need(2, 0, Action("BW", 3)), need(2, 1, Action("B", 3))
    ((0, 'F', 0), (1, 'B', 3), None)
    """
    kind, index = action
    if kind == "F" and stage:
        return stage - 1, "F", index
    if kind in ("B", "BW") and stage < stages - 1:
        return stage + 1, "B", index
    return None


def check_schedule(schedule: Schedule) -> int:
    """The number of micro-batches of a schedule.

    Raises:
        TypeError: it is not a sequence of sequences of actions.
        ValueError: a stage leaves out or repeats an action, or has one before what it needs; or
            stages wait for each other for ever.

    >>> F, BW = Action("F", 0), Action("BW", 0)
    >>> check_schedule(((F, BW), (F, BW)))
    1
    >>> check_schedule(((F, BW), (BW, F)))
    Traceback (most recent call last):
    ...
    ValueError: schedule: stage 1 has BW0 before F0
    """
    count = _micro_batches(schedule)
    for stage, actions in enumerate(schedule):
        _check_stage(stage, actions, count)
    for _ in in_turn(schedule):
        pass
    return count


def _micro_batches(schedule: Any) -> int:
    is_sequence = isinstance(schedule, Sequence) and not isinstance(schedule, str) and schedule
    expected = "schedule: expects a tuple of the actions of each stage"
    require(is_sequence, f"{expected}, got {schedule!r}", TypeError)
    for stage, actions in enumerate(schedule):
        fits = isinstance(actions, Sequence) and not isinstance(actions, (str, Action))
        require(fits, f"{expected}, got {actions!r} for stage {stage}", TypeError)
        for action in actions:
            good = isinstance(action, Action) and action.kind in KINDS
            good = good and isinstance(action.micro_batch, int) and action.micro_batch >= 0
            wanted = f"an Action of one of the kinds {list(KINDS)}"
            require(good, f"schedule: expects {wanted}, got {action!r} in stage {stage}", TypeError)
    counts = [len({action.micro_batch for action in actions}) for actions in schedule]
    same = len({*counts}) == 1 and counts[0]
    require(same, f"schedule: expects as many micro-batches in each stage, got {counts}")
    return counts[0]


def _check_stage(stage: int, actions: Sequence[Action], count: int) -> None:
    where = f"schedule: stage {stage}"
    done: dict[Action, None] = {}
    for action in actions:
        kind, index = action
        require(action not in done, f"{where} has {action} twice")
        before = {"F": None, "B": "F", "BW": "F", "W": "B"}[kind]
        if before is not None:
            first = Action(before, index)
            require(first in done, f"{where} has {action} before {first}")
        both = {"B": "BW", "BW": "B"}.get(kind)
        require(
            both is None or Action(both, index) not in done,
            f"{where} has both B{index} and BW{index}",
        )
        done[action] = None
    order = [action.micro_batch for action in done if action.kind == "F"]
    require(
        order == [*range(count)],
        f"{where} expects the forward passes of 0 to {count - 1} in this order, since state goes "
        f"from one to the next, got {order}",
    )
    for index in range(count):
        whole = Action("BW", index) in done or Action("W", index) in done
        require(whole, f"{where} never computes the gradients of micro-batch {index}")


def in_turn(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    """Each stage and action in an order in which all that one waits for came before it.

    Raises: ValueError: stages wait for each other for ever.
    """
    stages = len(schedule)
    reached, given = [0] * stages, set[Needed]()
    going = True
    while going:
        going = False
        for stage, actions in enumerate(schedule):
            while reached[stage] < len(actions):
                action = actions[reached[stage]]
                needed = need(stages, stage, action)
                if needed is not None and needed not in given:
                    break
                yield stage, action
                given.add((stage, "B" if action.kind == "BW" else action.kind, action.micro_batch))
                reached[stage] += 1
                going = True
    waits = []
    for stage, actions in enumerate(schedule):
        if reached[stage] < len(actions):
            action = actions[reached[stage]]
            other, kind, index = need(stages, stage, action) or (stage, "", 0)
            waits.append(f"stage {stage} at {action} for {kind}{index} of stage {other}")
    require(not waits, f"schedule: stages wait for each other for ever: {', '.join(waits)}")
