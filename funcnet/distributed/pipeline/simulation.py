"""A schedule on the clock, without processes: when each stage works and when it waits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from funcnet.distributed.pipeline.actions import Action, Schedule, check_schedule, in_turn, need
from funcnet.errors import require

_COLUMNS = 100
_CELL = 3
"""The width of the shortest action, where there is room: a letter, an index and a space."""

Cost = float | Sequence[float]


class Slot(NamedTuple):
    """An action, when it starts and when it ends."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """What `simulate` finds; its repr draws it."""

    timeline: tuple[tuple[Slot, ...], ...]
    """The actions of each stage with their times."""

    held: tuple[int, ...]
    """Of how many micro-batches each stage holds activations at most, from the forward pass to the
    gradients of the params."""

    @property
    def time(self) -> float:
        """From the start of the first action to the end of the last."""
        return max([slots[-1].end for slots in self.timeline])

    @property
    def spans(self) -> tuple[float, ...]:
        """For each stage, from the start of its first action to the end of its last."""
        return tuple([slots[-1].end - slots[0].start for slots in self.timeline])

    @property
    def idle(self) -> tuple[float, ...]:
        """For each stage, how long it waits between its first action and its last."""
        work = [sum([slot.end - slot.start for slot in slots]) for slots in self.timeline]
        return tuple([span - busy for span, busy in zip(self.spans, work, strict=True)])

    @property
    def bubble(self) -> float:
        """The part of the ranks' time in which they do nothing, of the longest span.

        A stage that starts later than the first one ends later, and starts its next step later:
        that is why time before the first action is no loss, as in the paper of `zero_bubble`.
        """
        work = sum(self.spans) - sum(self.idle)
        return 1.0 - work / (len(self.timeline) * max(self.spans))

    def __repr__(self) -> str:
        slots = [slot for slots in self.timeline for slot in slots]
        lengths = [slot.end - slot.start for slot in slots if slot.end > slot.start]
        scale = min(_CELL / min(lengths, default=1.0), _COLUMNS / (self.time or 1.0))
        lines = [f"time {self.time:g}, bubble {self.bubble:.1%}"]
        for stage, (row, held) in enumerate(zip(self.timeline, self.held, strict=True)):
            text = ""
            for slot in row:
                start, end = round(slot.start * scale), round(slot.end * scale)
                label = str(slot.action)
                if len(label) > end - start:
                    label = label[: end - start]
                text = text.ljust(start, ".") + label.ljust(end - start)
            lines.append(f"{stage:3} |{text.ljust(round(self.time * scale), '.')}| holds {held}")
        return "\n".join(lines)


def simulate(
    schedule: Schedule,
    forward: Cost = 1.0,
    backward: Cost = 1.0,
    weights: Cost = 1.0,
    communicate: float = 0.0,
) -> Simulation:
    """When each stage of a pipeline does what, if each does its actions in order as soon as it can.

    Args:
        schedule: as `gpipe`, `one_f_one_b` and `zero_bubble` make it, or one's own.
        forward: the time of a forward pass; a number, or one for each stage.
        backward: that of the backward pass for the input.
        weights: that of the backward pass for the params.
        communicate: the time that a tensor takes from a stage to the next one, which both spend on
            other things.

    Returns:
        a `Simulation`: ``time``, ``bubble``, the ``timeline`` of each stage, how many activations
        it has ``held`` at most. Its repr is a drawing, with dots for idle time.
    Raises:
        ValueError: an action is missing, there twice, or before what it needs; or stages wait for
            each other for ever.

    >>> from funcnet.distributed import one_f_one_b, zero_bubble
    >>> simulate(one_f_one_b(2, 2))
    time 9, bubble 33.3%
      0 |F0 F1 ......BW0   ...BW1   | holds 2
      1 |...F0 BW0   F1 BW1   ......| holds 1
    >>> simulate(zero_bubble(2, 2))
    time 7, bubble 14.3%
      0 |F0 F1 ...B0 W0 B1 W1 | holds 2
      1 |...F0 B0 F1 B1 W0 W1 | holds 2
    >>> before, after = simulate(one_f_one_b(4, 8)), simulate(zero_bubble(4, 8))
    >>> max(before.idle), max(after.idle), max(before.held), max(after.held)
    (9.0, 3.0, 4, 4)
    """
    check_schedule(schedule)
    stages = len(schedule)
    costs = {
        "F": _per_stage("forward", forward, stages),
        "B": _per_stage("backward", backward, stages),
        "W": _per_stage("weights", weights, stages),
    }
    costs["BW"] = [sum(both) for both in zip(costs["B"], costs["W"], strict=True)]
    delay = _per_stage("communicate", communicate, stages)[0]
    slots: list[list[Slot]] = [[] for _ in range(stages)]
    ends: dict[tuple[int, str, int], float] = {}
    for stage, action in in_turn(schedule):
        start = slots[stage][-1].end if slots[stage] else 0.0
        needed = need(stages, stage, action)
        if needed is not None:
            start = max(start, ends[needed] + delay)
        end = start + costs[action.kind][stage]
        kind = "B" if action.kind == "BW" else action.kind
        ends[stage, kind, action.micro_batch] = end
        slots[stage].append(Slot(action, start, end))
    return Simulation(tuple([tuple(row) for row in slots]), tuple(map(held_by, schedule)))


def held_by(actions: Sequence[Action]) -> int:
    """Of how many micro-batches activations are held at most."""
    held = most = 0
    for action in actions:
        held += {"F": 1, "B": 0}.get(action.kind, -1)
        most = max(most, held)
    return most


def _per_stage(name: str, cost: Cost, stages: int) -> list[float]:
    costs = [cost] * stages if isinstance(cost, (int, float)) else [*cost]
    fits = len(costs) == stages and all([each >= 0 for each in costs])
    require(fits, f"simulate: expects for {name} a number >= 0, or {stages} of them, got {cost!r}")
    return [float(each) for each in costs]
