"""Schedules of pipelines: what they promise, and what `simulate` finds wrong."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st

import funcnet as fn
from funcnet.distributed import Action, gpipe, one_f_one_b, simulate, zero_bubble
from funcnet.distributed.pipeline.actions import check_schedule

SIZES = {"stages": st.integers(1, 7), "micro_batches": st.integers(1, 12)}
COSTS = st.floats(0.25, 4.0)


@given(**SIZES, held=st.integers(1, 16), costs=st.tuples(COSTS, COSTS, COSTS, COSTS))
@settings(deadline=None, max_examples=60)
def test_a_schedule_is_valid_and_on_the_clock_nothing_is_before_what_it_needs(
    stages, micro_batches, held, costs
):
    makers = gpipe, one_f_one_b, zero_bubble, partial(zero_bubble, held=held)
    for make in makers:
        schedule = make(stages, micro_batches)
        assert check_schedule(schedule) == micro_batches
        found = simulate(schedule, *costs)
        delay, work = costs[3], micro_batches * sum(costs[:3])
        times = {
            (stage, kind, slot.action.micro_batch): (slot.start, slot.end)
            for stage, slots in enumerate(found.timeline)
            for slot in slots
            for kind in slot.action.kind
        }
        for (stage, kind, index), (start, _) in times.items():
            if kind == "F" and stage:
                assert start >= times[stage - 1, "F", index][1] + delay
            if kind == "B" and stage < stages - 1:
                assert start >= times[stage + 1, "B", index][1] + delay
            if kind != "F":
                assert start >= times[stage, "F", index][1]
        for slots in found.timeline:
            for before, after in pairwise(slots):
                assert after.start >= before.end
        for span, idle in zip(found.spans, found.idle, strict=True):
            assert span - idle == pytest.approx(work)
        assert 0 <= found.bubble + 1e-9 < 1 + 1e-9
        assert found.time >= max(found.spans) - 1e-9
        assert repr(found).count("|") == 2 * stages


@given(**SIZES)
@settings(deadline=None, max_examples=40)
def test_activations_that_are_held(stages, micro_batches):
    assert {*simulate(gpipe(stages, micro_batches)).held} == {micro_batches}
    found = simulate(one_f_one_b(stages, micro_batches)).held
    assert found == tuple([min(stages - stage, micro_batches) for stage in range(stages)])
    for most in range(1, 2 * stages):
        found = simulate(zero_bubble(stages, micro_batches, held=most)).held
        assert max(found) == min(most, micro_batches)


@given(stages=st.integers(1, 7), more=st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_idle_time_is_that_of_the_paper(stages, more):
    micro_batches = 2 * stages + more
    costs = {"forward": 1.0, "backward": 1.25, "weights": 0.75}
    late = stages - 1
    for make, expected in (
        (gpipe, late * 3.0),
        (one_f_one_b, late * 3.0),
        (zero_bubble, late * (1.0 + 1.25 - 0.75)),
    ):
        found = simulate(make(stages, micro_batches), **costs)
        assert max(found.idle) == pytest.approx(expected)
    assert max(simulate(zero_bubble(stages, micro_batches, held=2 * stages - 1)).idle) == 0


def test_the_bubble_of_zero_bubble_is_a_third():
    before, after, none = (
        simulate(make(4, 8)) for make in (one_f_one_b, zero_bubble, partial(zero_bubble, held=7))
    )
    assert max(after.idle) / max(before.idle) == pytest.approx(1 / 3)
    assert max(before.held) == max(after.held) == 4
    assert (before.time, after.time, none.bubble) == (33, 27, 0)


def test_costs_of_each_stage():
    found = simulate(gpipe(2, 2), forward=[1, 2], communicate=0.5)
    assert [slot.start for slot in found.timeline[1]] == [1.5, 3.5, 5.5, 7.5]
    with pytest.raises(ValueError, match="simulate: expects for weights a number >= 0, or 2 of th"):
        simulate(gpipe(2, 2), weights=[1, 2, 3])


F0, F1, B0, W0 = Action("F", 0), Action("F", 1), Action("B", 0), Action("W", 0)
BW0, BW1 = Action("BW", 0), Action("BW", 1)


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        ((), TypeError, "expects a tuple of the actions of each stage, got"),
        ("F0", TypeError, "expects a tuple of the actions of each stage, got 'F0'"),
        ((F0, BW0), TypeError, "got F0 for stage 0"),
        ((("F", 0),), TypeError, "an Action of one of the kinds"),
        (((F0, ("BW", 0)),), TypeError, "an Action of one of the kinds"),
        (((Action("X", 0),),), TypeError, "got X0 in stage 0"),
        (((F0, BW0), (F0, BW0, F1, BW1)), ValueError, r"as many micro-batches .* got \[1, 2\]"),
        (((F0, F0, BW0),), ValueError, "stage 0 has F0 twice"),
        (((F0, B0, BW0),), ValueError, "stage 0 has both B0 and BW0"),
        (((F0, W0, B0),), ValueError, "stage 0 has W0 before B0"),
        (((F0, B0),), ValueError, "stage 0 never computes the gradients of micro-batch 0"),
        (((BW0,),), ValueError, "stage 0 has BW0 before F0"),
        (((F1, BW1, F0, BW0),), ValueError, r"0 to 1 in this order, .* got \[1, 0\]"),
        (
            ((F0, BW0, F1, BW1), (F0, F1, BW0, BW1)),
            ValueError,
            "wait for each other for ever: stage 0 at BW0 for B0 of stage 1, "
            "stage 1 at F1 for F1 of stage 0",
        ),
    ],
)
def test_what_is_no_schedule(schedule, error, message):
    with pytest.raises(error, match=f"schedule: .*{message}"):
        simulate(schedule)


@pytest.mark.parametrize("make", [gpipe, one_f_one_b, zero_bubble])
def test_counts_are_checked(make):
    with pytest.raises(ValueError, match=f"{make.__name__}: stages must be an integer >= 1, got 0"):
        make(0, 4)
    with pytest.raises(ValueError, match=r"micro_batches must be an integer >= 1, got 2\.5"):
        make(2, 2.5)


NET = fn.serial(a=fn.linear(8), b=fn.relu(), c=fn.linear(8), d=fn.linear(2))


def test_which_layers_a_stage_has():
    x = torch.ones(4, 3)
    assert fn.distributed.pipeline_stages(NET, x, 2) == (("a", "b"), ("c", "d"))
    assert fn.distributed.pipeline_stages(NET, x, 4) == (("a",), ("b",), ("c",), ("d",))
    given = fn.distributed.pipeline_stages(NET, x, 2, boundaries=[1])
    assert given == fn.distributed.pipeline_stages(NET, x, 2, boundaries=["b"])
    with pytest.raises(ValueError, match="5 stages are more than the 4 layers"):
        fn.distributed.pipeline_stages(NET, x, 5)
    for wrong in (["b"], ["c", "b"], ["b", "e"], ["a", "b"], ["b", 7]):
        with pytest.raises(ValueError, match=r"expects as boundaries 2 of the layers \['a', 'b'"):
            fn.distributed.pipeline_stages(NET, x, 3, boundaries=wrong)
    with pytest.raises(TypeError, match="expects a serial, or a tie of one, got linear"):
        fn.distributed.pipeline_stages(fn.linear(3), x, 1)
