"""The programs of ``examples/``: each runs as a user runs it, and its parts do what they say."""

import importlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import funcnet as fn

pytestmark = pytest.mark.cpu_only

EXAMPLES = Path(__file__).parents[2] / "examples"

OPTIONS = {
    "char_lm": (
        "--seed",
        "--steps",
        "--small",
        "--prompt",
        "--temperature",
        "--checkpoint",
        "--resume",
        "--output",
    ),
    "disk_classifier": (
        "--seed",
        "--seeds",
        "--epochs",
        "--batch-size",
        "--optimizer",
        "--lr",
        "--activation",
        "--loss",
        "--output",
    ),
    "custom_loop": ("--seed", "--epochs"),
    "deep_ensemble": ("--seed", "--members", "--epochs", "--output"),
    "digits_cnn": ("--seed", "--epochs", "--images", "--output"),
    "fit_dataloader": ("--epochs", "--images", "--workers", "--checkpoint"),
    "influence": ("--seed", "--epochs", "--output"),
    "kfac_autoencoder": ("--seed", "--steps", "--output"),
    "pinn": ("--seed", "--steps", "--quick", "--output"),
    "plan_7b": (
        "--ranks",
        "--batch",
        "--sequence",
        "--sequences",
        "--schedule",
        "--again",
        "--overlap",
        "--most",
    ),
    "policy_gradient": ("--seed", "--updates", "--quick", "--output"),
    "private_digits": ("--seed", "--epochs", "--epsilon", "--images"),
    "ppo": ("--seed", "--seeds", "--updates", "--quick", "--output"),
    "population_sweep": (
        "--seed",
        "--repetitions",
        "--epochs",
        "--batch-sizes",
        "--activations",
        "--quick",
        "--results",
        "--slice",
        "--output",
    ),
    "resume": ("--seed", "--kills", "--jit"),
    "sequence_lstm": ("--seed", "--steps", "--places", "--longest", "--hidden"),
    "report_tables": ("--table", "--seeds", "--epochs", "--output"),
    "vanishing": ("--seed", "--depth", "--steps", "--output"),
}


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run an example in a process of its own, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{program}.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        # Progress bars and argparse print what UTF-8 alone can encode, in 80 columns.
        env={**os.environ, "MPLBACKEND": "Agg", "PYTHONIOENCODING": "utf-8", "COLUMNS": "80"},
        check=False,
    )


def output_of(program: str, *arguments: object) -> str:
    """What a run prints that must succeed."""
    done = run(program, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_png(path: Path) -> bool:
    content = path.read_bytes()
    return content.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in content[-12:]


@pytest.fixture(scope="module")
def disk() -> Iterator[ModuleType]:
    module = importlib.import_module("disk")
    threads = torch.get_num_threads()
    module.one_thread()
    yield module
    torch.set_num_threads(threads)


@pytest.mark.parametrize("program", OPTIONS)
def test_help_lists_every_option(program: str) -> None:
    listed = set(re.findall(r"^  (?:-h, )?(--[\w-]+)", output_of(program, "--help"), re.MULTILINE))
    assert listed == {"--help", *OPTIONS[program]}


def test_disk_classifier_learns_prints_errors_and_draws(tmp_path: Path) -> None:
    figure = tmp_path / "made" / "disk.png"
    done = run("disk_classifier", "--seeds", 2, "--epochs", 25, "--output", figure)
    assert done.returncode == 0, done.stderr
    line = r"seed {}: train loss 0\.\d+, error \d+\.\d\d%; test loss 0\.\d+, error (\d+\.\d\d)%\n"
    mean = r"mean test error of 2 seeds: (\d+\.\d\d)% \(standard deviation \d+\.\d\d%\)\n"
    found = re.match(line.format(0) + line.format(1) + mean, done.stdout)
    assert found
    first, second, average = map(float, found.groups())
    assert max(first, second) <= 4
    assert average == pytest.approx((first + second) / 2, abs=0.011)
    assert "25/25" in done.stderr  # the progress bar
    assert is_png(figure)


def test_disk_classifier_stands_alone_and_is_short() -> None:
    source = (EXAMPLES / "disk_classifier.py").read_text()
    assert len(source.splitlines()) <= 120
    imported = re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE)
    assert not {path.stem for path in EXAMPLES.glob("*.py")} & set(imported)


@pytest.mark.parametrize(
    "options",
    [
        ("--optimizer", "sgd_momentum", "--loss", "mse", "--activation", "tanh", "--lr", 0.05),
        ("--optimizer", "rmsprop", "--loss", "mae", "--batch-size", 300, "--seed", 7),
    ],
)
def test_disk_classifier_takes_other_settings(options: tuple[object, ...], tmp_path: Path) -> None:
    figure = tmp_path / "disk.png"
    seed = 7 if "--seed" in options else 0
    printed = output_of("disk_classifier", *options, "--epochs", 1, "--output", figure)
    assert printed.startswith(f"seed {seed}: train loss")
    assert is_png(figure)


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("disk_classifier", ("--epochs", 0)),
        ("disk_classifier", ("--batch-size", 1001)),
        ("report_tables", ("--seeds", 0)),
        ("report_tables", ("--table", "none")),
        ("digits_cnn", ("--epochs", 0)),
        ("sequence_lstm", ("--places", 0)),
        ("policy_gradient", ("--updates", 15)),
        ("ppo", ("--seeds", 0)),
        ("pinn", ("--steps", 15)),
        ("digits_cnn", ("--images", 50)),
        ("digits_cnn", ("--images", 5001)),
        ("private_digits", ("--epsilon", 0)),
        ("private_digits", ("--images", 50)),
        ("char_lm", ("--steps", 30)),
        ("influence", ("--epochs", 0)),
        ("kfac_autoencoder", ("--steps", 0)),
        ("char_lm", ("--temperature", 0)),
        ("char_lm", ("--small", "--prompt", 33 * "x")),
    ],
)
def test_wrong_options_are_refused(program: str, arguments: tuple[object, ...]) -> None:
    done = run(program, *arguments)
    assert done.returncode == 2
    assert "error:" in done.stderr


def test_custom_loop_prints_losses_and_error() -> None:
    printed = output_of("custom_loop", "--epochs", 2)
    assert re.fullmatch(
        r"epoch 1: loss 0\.\d+\nepoch 2: loss 0\.\d+\ntest error \d+\.\d\d%\n", printed
    )


def test_private_digits_prints_the_epsilon_that_it_spends() -> None:
    printed = output_of("private_digits", "--images", 600, "--epochs", 2, "--epsilon", 3)
    lines = (
        r"noise \d\.\d\d times the bound, for 6 steps at a rate of 0\.417\n"
        r"epoch 1: epsilon [12]\.\d\d, accuracy \d+\.\d%\n"
        r"epoch 2: epsilon (3\.00|2\.99), accuracy \d+\.\d%\n"
    )
    assert re.fullmatch(lines, printed)


def test_digits_cnn_prints_its_accuracy_and_draws(tmp_path: Path) -> None:
    figure = tmp_path / "made" / "digits.png"
    done = run("digits_cnn", "--images", 600, "--epochs", 2, "--output", figure)
    assert done.returncode == 0, done.stderr
    line = r"test accuracy \d+\.\d\d% \(\d+ of 120 wrong\), \d+\.\d s with compilation"
    assert re.fullmatch(line, done.stdout.splitlines()[-1])
    assert "2/2" in done.stderr  # the progress bar
    assert is_png(figure)


def char_lm_arguments(folder: Path, name: str) -> list[str]:
    files = "--checkpoint", folder / f"{name}.safetensors", "--output", folder / f"{name}.png"
    return ["--small", "--prompt", "The\n", *map(str, files)]


def test_char_lm_that_is_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = output_of("char_lm", *char_lm_arguments(tmp_path, "whole"))
    line = r"validation bits per character: bigrams \d\.\d+, trigrams \d\.\d+, GPT \d\.\d+; "
    text, ways = r"\n\nThe\n(.|\n){29}\n\n", r"\d+ by a compiled step for each, \d+ by one scan"
    assert re.search(ways, whole)

    program = [sys.executable, EXAMPLES / "char_lm.py", *char_lm_arguments(tmp_path, "killed")]
    saved = {name: tmp_path / f"{name}.safetensors" for name in ("whole", "killed")}
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as killed:
        while not saved["killed"].exists() and killed.poll() is None:
            time.sleep(0.01)
        killed.kill()
    assert killed.returncode == -signal.SIGKILL
    resumed = output_of("char_lm", *char_lm_arguments(tmp_path, "killed"), "--resume")

    for pattern in (line, text):
        assert re.search(pattern, resumed)[0] == re.search(pattern, whole)[0]
    runs = [fn.load(path) for path in saved.values()]
    for one, other in zip(*map(fn.tree.leaves, runs), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert all(is_png(path.with_suffix(".png")) for path in saved.values())


def test_a_run_that_is_killed_ends_as_the_run_left_alone() -> None:
    printed = output_of("resume", "--kills", 1)
    killed = r"killed after step \d+ of 300, goes on from step \d+0?\n"
    assert re.fullmatch(killed + r"all \d+ tensors are equal, bit for bit\n", printed)


TABLES = {
    "activations.png": ("MSE   0.01 ", "MAE   0.05 "),
    "pytorch.png": ("ReLU ", "LeakyReLU ", "  report "),
    "losses.png": ("MSE_SGD ", "BCE_Adam ", "WS_MSE_Adam ", "  report "),
    "batch_sizes.png": ("100    ReLU ", "200    Tanh ", "         report "),
}


def test_report_tables_are_printed_and_drawn(tmp_path: Path) -> None:
    printed = output_of("report_tables", "--seeds", 1, "--epochs", 1, "--output", tmp_path)
    lines = printed.splitlines()
    for figure, rows in TABLES.items():
        assert f"wrote {tmp_path / figure}" in lines
        assert is_png(tmp_path / figure)
        for row in rows:
            assert any(line.startswith(row) for line in lines), (row, printed)
    assert " ± " in printed
    for net in ("ReLU", "LeakyReLU"):
        row = next(line for line in lines if line.startswith(net + " "))
        assert row.endswith("pass"), f"parameters differ from PyTorch's: {row}"


def test_one_report_table(tmp_path: Path) -> None:
    options = ("--table", "activations", "--seeds", 2, "--epochs", 1, "--output", tmp_path)
    printed = output_of("report_tables", *options)
    assert re.search(r"\bpass\b|\bFAIL\b", printed)
    assert [path.name for path in tmp_path.iterdir()] == ["activations.png"]


@pytest.mark.parametrize(("label", "share"), [("in_disk", 0.5), ("out_of_annulus", 0.34)])
def test_share_of_label_one_is_its_area(disk: ModuleType, label: str, share: float) -> None:
    data = disk.draw(fn.key(0), 100_000, getattr(disk, label))
    assert data.points.shape == (100_000, 2)
    assert data.labels.dtype == torch.int64
    assert data.labels.float().mean().item() == pytest.approx(share, abs=0.01)


def test_boundary_of_the_disk(disk: ModuleType) -> None:
    radius = 1 / math.sqrt(2 * math.pi)
    for angle in range(0, 360, 15):
        way = torch.tensor([math.cos(math.radians(angle)), math.sin(math.radians(angle))])
        points = 0.5 + torch.outer(torch.tensor([0.0, radius - 1e-4, radius + 1e-4]), way)
        assert disk.in_disk(points).tolist() == [1, 1, 0]


def test_boundaries_of_the_annulus(disk: ModuleType) -> None:
    inner = 1 / math.sqrt(2 * math.pi)
    radii = torch.tensor([0.0, inner - 1e-4, inner + 1e-4, 1 - 1e-4, 1 + 1e-4])
    for angle in range(0, 91, 15):
        way = torch.tensor([math.cos(math.radians(angle)), math.sin(math.radians(angle))])
        assert disk.out_of_annulus(torch.outer(radii, way)).tolist() == [1, 1, 0, 0, 1]


def test_data_are_a_function_of_the_key(disk: ModuleType) -> None:
    first, again = (disk.draw(fn.key(3), 50) for _ in range(2))
    other = disk.draw(fn.key(4), 50)
    assert torch.equal(first.points, again.points)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.points, other.points)
    assert ((first.points >= 0) & (first.points < 1)).all()


def test_standardized_uses_the_training_points_alone(disk: ModuleType) -> None:
    train, test = disk.draw(fn.key(0), 1000), disk.draw(fn.key(1), 10)
    scaled, scaled_test = disk.standardized(train, test)
    assert torch.allclose(scaled.points.mean(0), torch.zeros(2), atol=1e-5)
    assert torch.allclose(scaled.points.std(0), torch.ones(2), atol=1e-5)
    back = scaled_test.points * train.points.std(0) + train.points.mean(0)
    assert torch.allclose(back, test.points, atol=1e-5)
    assert torch.equal(scaled_test.labels, test.labels)


def test_an_epoch_has_every_example_once_in_an_order_of_the_key(disk: ModuleType) -> None:
    x = torch.arange(10.0)
    batches = list(disk.shuffled(fn.key(0), x, -x, 4))
    assert [len(part) for part, _ in batches] == [4, 4, 2]
    assert all(torch.equal(part, -target) for part, target in batches)
    order = torch.cat([part for part, _ in batches])
    assert torch.equal(order.sort().values, x)
    again = torch.cat([part for part, _ in disk.shuffled(fn.key(0), x, -x, 4)])
    other = torch.cat([part for part, _ in disk.shuffled(fn.key(1), x, -x, 4)])
    assert torch.equal(order, again)
    assert not torch.equal(order, other)


def test_linear_decay_ends_at_zero(disk: ModuleType) -> None:
    steps = disk.steps_in(1000, 300, 5)
    assert steps == 20
    rate = disk.linear_decay(0.5, steps)
    assert [rate(torch.tensor(step)).item() for step in (0, 10, 20)] == [0.5, 0.25, 0.0]
