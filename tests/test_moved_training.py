"""A training as PyTorch's users write it, moved over: the same numbers, in no more lines.

A ResNet on images, AdamW with warm-up and a cosine, clipping, mixed precision, an average of the
weights, a DataLoader, checkpoints. `torch_` is the one, `moved_` the other.
"""

import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import funcnet as fn

pytestmark = pytest.mark.cpu_only


class TorchBlock(nn.Module):
    def __init__(self, before, channels, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or before != channels:
            self.shortcut.append(nn.Conv2d(before, channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(channels))

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


def torch_resnet():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        TorchBlock(8, 8, 1),
        TorchBlock(8, 16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def torch_training(model, loader, test_loader, folder, epochs, mixed):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    steps, warmup = epochs * len(loader), 10
    warming = LinearLR(optimizer, 0.1, total_iters=warmup)
    cosine = CosineAnnealingLR(optimizer, steps - warmup)
    scheduler = SequentialLR(optimizer, [warming, cosine], [warmup])
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    losses, accuracies, step = [], [], 0
    for _ in range(epochs):
        model.train()
        for x, target in loader:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = F.cross_entropy(model(x), target)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            ema.update_parameters(model)
            losses.append(loss.item())
            step += 1
            if step % 20 == 0:
                parts = {"model": model, "ema": ema, "optimizer": optimizer, "lr": scheduler}
                state = {name: part.state_dict() for name, part in parts.items()}
                torch.save({**state, "step": step}, folder / f"step_{step}.pt")
        ema.eval()
        right = total = 0
        with torch.no_grad():
            for x, target in test_loader:
                right += (ema(x).argmax(1) == target).sum().item()
                total += len(target)
        accuracies.append(right / total)
    return losses, accuracies


def moved_block(channels, stride, projects):
    body = fn.serial(
        fn.conv2d(channels, 3, stride, 1, bias=False),
        fn.batch_norm(),
        fn.relu(),
        fn.conv2d(channels, 3, padding=1, bias=False),
        fn.batch_norm(),
    )
    shortcut = fn.identity()
    if projects:
        shortcut = fn.serial(fn.conv2d(channels, 1, stride, bias=False), fn.batch_norm())
    return fn.serial(both=fn.branch(body, shortcut), sum=fn.add(), act=fn.relu())


def moved_resnet():
    return fn.serial(
        fn.conv2d(8, 3, padding=1, bias=False),
        fn.batch_norm(),
        fn.relu(),
        moved_block(8, 1, False),
        moved_block(16, 2, True),
        fn.adaptive_avg_pool2d(1),
        fn.flatten(),
        fn.linear(4),
    )


def moved_training(model, loader, test_loader, folder, epochs, mixed):
    steps, warmup = epochs * len(loader), 10
    warming = fn.schedules.linear(3e-3, 0.1, total_iters=warmup)
    cosine = fn.schedules.cosine(3e-3, steps - warmup)
    adamw = fn.adamw(fn.schedules.join([warming, cosine], [warmup]), weight_decay=0.05)
    clipped = fn.chain(fn.optimizers.clip_by_global_norm(1.0), adamw)
    optimizer = fn.optimizers.params_ema(clipped, 0.9)
    step = fn.train_step(
        fn.cast(model, torch.bfloat16) if mixed else model, fn.cross_entropy(), optimizer
    )
    accuracy = {"accuracy": fn.metrics.accuracy()}
    validation = fn.evaluate(model, fn.cross_entropy(), accuracy, test_loader, averaged=True)
    state = fn.init_train_state(model, optimizer, fn.key(0), loader.dataset[0][0][None])
    state, history = fn.fit(
        step, state, loader, epochs=epochs, validation=validation, checkpoint=folder, every=20
    )
    return history["loss"], history["val_accuracy"]


def images(dtype):
    """Images of 8 x 8, in four classes: where the bright stripe is."""
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(80) % 4
    x = 0.7 * torch.randn(80, 1, 8, 8, generator=generator, dtype=torch.float64)
    x[torch.arange(80), :, 2 * target] += 1
    train, test = TensorDataset(x[:64].to(dtype), target[:64]), TensorDataset(x.to(dtype), target)
    order = torch.Generator().manual_seed(1)
    return DataLoader(train, 12, shuffle=True, generator=order), DataLoader(test, 32)


def run_both(dtype, folder, mixed):
    """The losses and accuracies of both, from the same weights, over 54 steps."""
    model = moved_resnet()
    params, state = model.init(fn.key(0), images(dtype)[0].dataset.tensors[0])
    theirs = torch_resnet().to(dtype)
    weights = fn.tree.to_dotted(fn.tree.merge(params, state))
    names = {".both.0.": ".body.", ".both.1.": ".shortcut."}
    for ours, its in names.items():
        weights = {name.replace(ours, its): leaf for name, leaf in weights.items()}
    theirs.load_state_dict(weights)
    (folder / "torch").mkdir()
    expected = torch_training(theirs, *images(dtype), folder / "torch", 9, mixed)
    found = moved_training(model, *images(dtype), folder / "funcnet", 9, mixed)
    return found, tuple(torch.tensor(each, dtype=torch.float64) for each in expected)


def test_the_losses_are_pytorchs_to_rounding_in_float64(tmp_path):
    (losses, accuracies), expected = run_both(torch.float64, tmp_path, False)
    assert len(losses) == 54
    torch.testing.assert_close(losses, expected[0], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(accuracies, expected[1])
    assert expected[0][-6:].mean() < 0.5 * expected[0][:6].mean()
    assert list(fn.checkpoint.steps(tmp_path / "funcnet")) == [20, 40, 54]


def test_in_mixed_precision_both_learn_the_same(tmp_path):
    (losses, _), (expected, _) = run_both(torch.float32, tmp_path, True)
    assert losses.dtype == torch.float32
    ends = [each[-6:].double().mean() for each in (losses, expected)]
    torch.testing.assert_close(*ends, rtol=0.25, atol=0.05)


def lines(*parts):
    """The lines of code, without those that are empty."""
    return sum(
        bool(line.strip()) for part in parts for line in inspect.getsource(part).splitlines()
    )


def test_it_takes_no_more_lines_than_in_pytorch():
    theirs = lines(TorchBlock, torch_resnet, torch_training)
    ours = lines(moved_block, moved_resnet, moved_training)
    assert ours <= theirs
    assert lines(moved_training) <= 0.6 * lines(torch_training)
