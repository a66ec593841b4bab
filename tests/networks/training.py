"""Ten training steps of a network and of its twin in torch.nn, from the same ``state_dict()``."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from networks import nets, transformer_twins, transformers, twins
from torch import Tensor, nn
from torch.nn import functional as F

import funcnet as fn

STEPS = 10
KEY = fn.key(7, device="cpu")
Noise = Callable[[int], Tensor]
"""The noise that a network draws in a step, which its twin is given."""


class Case(NamedTuple):
    """A network, its twin, and what they are trained with; sizes are those of CI, and the full."""

    net: Callable[..., fn.Layer]
    twin: Callable[..., nn.Module]
    optimizer: Callable[[], fn.Optimizer]
    twin_optimizer: Callable[[Any], torch.optim.Optimizer]
    example: tuple[int, ...]
    full_example: tuple[int, ...]
    options: Mapping[str, int] = {}
    """Of the network, for CI; at full size it has its defaults."""
    places: int = 0
    """How many of the last dimensions of an example have a class each."""
    batch: int = 6
    autoencodes: bool = False
    examples: Callable[..., Any] = torch.randn
    """The inputs of all steps, of their shape: a tensor, or a dict with "tgt" or "input"."""


def sgd() -> fn.Optimizer:
    return fn.sgd(0.02, momentum=0.9, weight_decay=5e-4, nesterov=True)


def torch_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.02, momentum=0.9, weight_decay=5e-4, nesterov=True)


def adamw() -> fn.Optimizer:
    return fn.adamw(1e-3, weight_decay=0.05)


def torch_adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 1e-3, weight_decay=0.05)


def tokens(shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> Tensor:
    """Of a vocabulary of 20, which a larger one has as well."""
    return torch.randint(20, shape, **options)


def sentences(shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Pairs of a source, the end of which is padding, and a target."""
    steps, batch, length = shape
    lengths = 1 + torch.arange(batch) % length
    return {
        "src": tokens(shape, dtype, **options),
        "tgt": tokens((steps, batch, length - 1), dtype, **options),
        "padding": (torch.arange(length) >= lengths[:, None]).expand(shape),
    }


def words(shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Sentences of several lengths."""
    lengths = torch.randint(1, shape[-1] + 1, shape[:2], **options)
    return {"input": tokens(shape, dtype, **options), "lengths": lengths}


SGD, ADAMW = (sgd, torch_sgd), (adamw, torch_adamw)
NARROW = {"width": 4}
CASES = {
    "lenet": Case(nets.lenet, twins.lenet, *SGD, (1, 28, 28), (1, 28, 28)),
    "resnet18": Case(nets.resnet18, twins.resnet18, *SGD, (3, 16, 16), (3, 32, 32), NARROW),
    "unet": Case(nets.unet, twins.unet, *ADAMW, (3, 16, 16), (3, 64, 64), NARROW, places=2),
    "mobilenet": Case(nets.mobilenet, twins.mobilenet, *ADAMW, (3, 24, 24), (3, 64, 64), NARROW),
    "vae": Case(
        nets.vae,
        twins.VAE,
        *ADAMW,
        (30,),
        (784,),
        {"pixels": 30, "width": 20, "latent": 4},
        autoencodes=True,
    ),
    "tagger": Case(
        nets.tagger,
        twins.Tagger,
        *ADAMW,
        (7,),
        (50,),
        {"words": 30, "width": 5},
        places=1,
        examples=words,
    ),
    "gpt": Case(
        transformers.language_model,
        transformer_twins.LanguageModel,
        *ADAMW,
        (7,),
        (64,),
        {"vocabulary": 20, "width": 8, "heads": 2, "layers": 2, "length": 8},
        places=1,
        examples=tokens,
    ),
    "vit": Case(
        transformers.vit,
        transformer_twins.vit,
        *ADAMW,
        (3, 8, 8),
        (3, 32, 32),
        {"width": 8, "heads": 2, "layers": 1},
    ),
    "transformer": Case(
        transformers.translator,
        transformer_twins.Translator,
        *SGD,
        (6,),
        (32,),
        {"vocabulary": 20, "width": 8, "heads": 2, "layers": 1, "length": 6},
        places=1,
        examples=sentences,
    ),
}


class Trained(NamedTuple):
    """What is left of a run."""

    losses: Tensor
    params: dict[str, Tensor]
    """By dotted path, as is the state: running statistics."""
    state: dict[str, Tensor]


def of_step(x: Any, step: int) -> Any:
    """The inputs of a step, of those of all steps."""
    return fn.tree.map(lambda leaf: leaf[step], x)


def start_of(case: Case, full: bool) -> tuple[fn.Layer, nn.Module, Any, Tensor]:
    """The network, its twin, and the inputs and targets of all steps, float64."""
    options = {} if full else case.options
    generator = torch.Generator("cpu").manual_seed(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        twin = case.twin(**options).double().cpu()
    shape = (STEPS, case.batch, *(case.full_example if full else case.example))
    if case.autoencodes:
        x = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
        return case.net(**options), twin, x, x
    x = case.examples(shape, generator=generator, dtype=torch.float64, device="cpu")
    places = (x.get("tgt", x.get("input")) if isinstance(x, dict) else x).shape
    labels = (STEPS, case.batch, *places[len(places) - case.places :])
    target = torch.randint(10, labels, generator=generator)
    if isinstance(x, dict) and "lengths" in x:
        # What is behind a sentence has no class.
        target[torch.arange(shape[-1]) >= x["lengths"][..., None]] = -100
    return case.net(**options), twin, x, target


def train(case: Case, full: bool, transform: Callable[..., Any] = lambda step: step) -> Trained:
    """Ten steps of the network; params and state by path from its twin's ``state_dict()``."""
    net, twin, x, target = start_of(case, full)
    parameters, buffers = dict(twin.named_parameters()), dict(twin.named_buffers())
    params, state = [
        fn.tree.from_dotted({path: leaf.detach().clone() for path, leaf in leaves.items()})
        for leaves in (parameters, buffers)
    ]
    optimizer, loss = case.optimizer(), nets.elbo() if case.autoencodes else fn.cross_entropy()
    train_state = fn.init_train_state(net, optimizer, KEY, of_step(x, 0))
    fn.tree.check_same_structure(train_state.params, params, "params of the twin")
    fn.tree.check_same_structure(train_state.state, state, "state of the twin")
    train_state = train_state._replace(
        params=params, state=state, opt_state=optimizer.init_state(params)
    )
    step = transform(fn.train_step(net, loss, optimizer))
    losses = []
    for number in range(STEPS):
        train_state, metrics = step(train_state, (of_step(x, number), target[number]))
        losses.append(metrics["loss"])
    trained = (fn.tree.to_dotted(part) for part in (train_state.params, train_state.state))
    return Trained(torch.stack(losses), *trained)


def train_twin(case: Case, full: bool) -> Trained:
    """Ten steps of the twin, by autograd and torch.optim."""
    _, twin, x, target = start_of(case, full)
    loss_of = twins.elbo if case.autoencodes else F.cross_entropy
    optimizer = case.twin_optimizer(twin.parameters())
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs = of_step(x, step)
        given = (noise_of(twin, step, len(inputs)),) if case.autoencodes else ()
        loss = loss_of(twin(inputs, *given), target[step])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    params = {path: leaf.detach() for path, leaf in twin.named_parameters()}
    return Trained(torch.stack(losses), params, dict(twin.named_buffers()))


def noise_of(twin: nn.Module, step: int, batch: int) -> Tensor:
    """The noise of the network's child "sample" in a step: a key's by name, a step's by number."""
    key = fn.fold_in(fn.fold_in(KEY, step), "sample")
    return fn.random.normal(key, (batch, twin.code[0].out_features), torch.float64)


def error(found: Trained, expected: Trained) -> float:
    """The greatest difference, relative to the largest number of each tensor."""
    assert found.params.keys() == expected.params.keys()
    assert found.state.keys() == expected.state.keys()
    pairs = [(found.losses, expected.losses)]
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        pairs += [(ours[path], theirs[path]) for path in theirs]
    return max([float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs])
