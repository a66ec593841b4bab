"""The cart and pole as pure functions: gymnasium's numbers, its ends, and what an episode earns."""

import cartpole
import numpy as np
import pytest
import torch

import funcnet as fn

pytestmark = pytest.mark.cpu_only

# CartPole-v1 of gymnasium 1.4.0: reset(seed=42), the actions, and what is observed after each.
ACTIONS = [1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]
OBSERVED = [
    [0.0273956, -0.006112156, 0.03585979, 0.0197368],
    [0.02727336, 0.1884777, 0.03625453, -0.2614198],
    [0.03104291, -0.00714255, 0.03102613, 0.04247424],
    [0.03090006, 0.1875211, 0.03187562, -0.2402605],
    [0.03465049, 0.3821735, 0.02707041, -0.5227209],
    [0.04229395, 0.1866812, 0.01661599, -0.2216322],
    [0.04602758, 0.3815618, 0.01218335, -0.5090278],
    [0.05365882, 0.57651, 0.002002789, -0.7978466],
    [0.06518902, 0.7716044, -0.01395414, -1.089899],
    [0.0806211, 0.9669075, -0.03575212, -1.386927],
    [0.09995925, 1.162456, -0.06349067, -1.690572],
    [0.1232084, 1.358252, -0.09730211, -2.002327],
    [0.1503734, 1.554245, -0.1373487, -2.323488],
    [0.1814583, 1.750322, -0.1838184, -2.655087],
    [0.2164648, 1.946285, -0.2369202, -2.997819],
]


def state_of(observed, steps=0):
    return cartpole.State(torch.tensor(observed), torch.tensor(steps), torch.tensor(False))


def numpy_step(observed, action):
    """The equations of Barto, Sutton and Anderson 1983 without friction, by Euler's method."""
    x, v, a, w = observed
    f = 10.0 if action else -10.0
    numerator = 9.8 * np.sin(a) + np.cos(a) * (-f - 0.1 * 0.5 * w**2 * np.sin(a)) / 1.1
    alpha = numerator / (0.5 * (4 / 3 - 0.1 * np.cos(a) ** 2 / 1.1))
    acceleration = (f + 0.1 * 0.5 * (w**2 * np.sin(a) - alpha * np.cos(a))) / 1.1
    return np.array([x + 0.02 * v, v + 0.02 * acceleration, a + 0.02 * w, w + 0.02 * alpha])


def test_steps_are_those_of_gymnasium():
    state = state_of(OBSERVED[0])
    for count, (action, expected) in enumerate(zip(ACTIONS, OBSERVED[1:], strict=True), 1):
        state, reward, fallen = cartpole.step(state, torch.tensor(action))
        torch.testing.assert_close(state.observed, torch.tensor(expected), rtol=1e-5, atol=1e-6)
        assert state.steps == count
        assert reward == 1
        assert fallen == (count == len(ACTIONS)) == state.fallen  # 0.2369 rad are 13.6 degrees


@pytest.mark.parametrize("action", [0, 1])
def test_steps_are_the_equations_in_float64(action):
    starts = fn.random.normal(fn.key(0), (20, 4), torch.float64)
    state = cartpole.State(starts, torch.zeros(20, dtype=torch.int64), starts[:, 0] > 99)
    after, _, fallen = cartpole.step(state, torch.full((20,), action))
    expected = np.stack([numpy_step(start, action) for start in starts.numpy()])
    np.testing.assert_allclose(after.observed.numpy(), expected, rtol=1e-12)
    out = (abs(expected[:, 0]) > 2.4) | (abs(expected[:, 2]) > 12 * np.pi / 180)
    assert fallen.tolist() == out.tolist()


def test_a_cart_falls_off_both_ends_of_its_track_and_is_worth_nothing_then():
    for side in (-1.0, 1.0):
        state = state_of([side * 2.39, side * 1.5, 0.0, 0.0])
        state, reward, fallen = cartpole.step(state, torch.tensor(1))
        assert (bool(fallen), reward) == (True, 1)
        # Back inside it stays what it is.
        state = state._replace(observed=torch.zeros(4))
        state, reward, fallen = cartpole.step(state, torch.tensor(1))
        assert (bool(fallen), reward) == (True, 0)


def test_a_step_of_many_carts_is_that_of_each():
    carts = fn.vmap(cartpole.reset)(fn.random.split(fn.key(0), 6))
    assert carts.observed.abs().max() <= 0.05
    assert carts.observed.unique().numel() == 24
    action = torch.arange(6) % 2
    for one, other in zip(
        cartpole.step(carts, action), fn.vmap(cartpole.step)(carts, action), strict=True
    ):
        assert all(map(torch.equal, fn.tree.leaves(one), fn.tree.leaves(other)))


def test_a_restart_is_where_it_is_said():
    old = state_of([1.0, 2.0, 0.1, 0.2], 500)
    assert cartpole.cut_off(old)
    assert not cartpole.cut_off(old._replace(steps=torch.tensor(499)))
    assert torch.equal(cartpole.restart(torch.tensor(False), old, fn.key(0)).observed, old.observed)
    new = cartpole.restart(torch.tensor(True), old._replace(fallen=torch.tensor(True)), fn.key(0))
    assert torch.equal(new.observed, cartpole.reset(fn.key(0)).observed)
    assert (new.steps, new.fallen) == (0, False)


def by_hand(observed):
    """Sure logits of a policy that balances the pole for as long as one likes."""
    lean = observed @ torch.tensor([0.05, 0.1, 1.0, 0.3])
    return 1e4 * torch.stack([-lean, lean], -1)


def test_what_an_episode_earns():
    assert cartpole.episode_return(by_hand, fn.key(0)) == cartpole.LIMIT == 500
    to_the_right = torch.tensor([-1e4, 1e4])
    earned = cartpole.episode_return(lambda observed: to_the_right, fn.key(3))
    state, steps = cartpole.reset(fn.random.split(fn.key(3))[0]), 0
    while not state.fallen:
        state, _, _ = cartpole.step(state, torch.tensor(1))
        steps += 1
    assert 8 <= earned == steps <= 11


def test_programs_that_are_timed_take_turns():
    called = []
    seconds = cartpole.seconds_of(
        {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
    )
    assert called == ["a", "b"] * 5
    assert all(value >= 0 for value in seconds.values())
