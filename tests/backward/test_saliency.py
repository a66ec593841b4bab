"""Guided backpropagation and the deconvnet: against hooks of PyTorch's."""

import pytest
import torch
from torch import nn

import funcnet as fn

IMAGES = fn.random.normal(fn.key(1), (2, 3, 8, 8), torch.float64)


def net():
    return fn.serial(
        fn.conv2d(4, 3),
        fn.relu(),
        fn.serial(fn.conv2d(4, 3), fn.relu()),
        fn.flatten(),
        fn.linear(5),
    )


class Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return dy * (x > 0) * (dy > 0)


class Deconv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, dy):
        return dy * (dy > 0)


@pytest.mark.parametrize(
    ("rewrite", "function"), [(fn.guided_backprop, Guided), (fn.deconvnet, Deconv)]
)
def test_the_gradient_of_an_output_is_that_of_torch_with_other_relus(rewrite, function):
    model = rewrite(net())
    params, _ = model.init(fn.key(0), IMAGES)
    y, pullback, _ = model.vjp(params, IMAGES, train=False)
    dy = torch.zeros_like(y)
    dy[:, 2] = 1.0
    _, dx = pullback(dy, params=False)

    class Relu(nn.Module):
        def forward(self, x):
            return function.apply(x)

    twin = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        Relu(),
        nn.Sequential(nn.Conv2d(4, 4, 3), Relu()),
        nn.Flatten(),
        nn.Linear(64, 5),
    ).double()
    twin.load_state_dict(fn.tree.to_dotted(params))
    x = IMAGES.clone().requires_grad_()
    out = twin(x)
    torch.testing.assert_close(y, out.detach())
    out[:, 2].sum().backward()
    torch.testing.assert_close(dx, x.grad)


@pytest.mark.parametrize("rewrite", [fn.guided_backprop, fn.deconvnet])
def test_a_model_without_relus_is_refused(rewrite):
    with pytest.raises(ValueError, match=r"expects a model with relus, got serial\(tanh\(\)\)"):
        rewrite(fn.serial(fn.tanh()))
    with pytest.raises(TypeError, match="expects a Layer"):
        rewrite(torch.relu)
