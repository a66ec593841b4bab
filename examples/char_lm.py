"""Train a GPT on the characters of Python's own documentation, and let it write some.

    python examples/char_lm.py
    python examples/char_lm.py --prompt "The with statement" --temperature 0.5 --resume

The text is what the interpreter's ``help()`` shows of the language, `pydoc_data.topics`; it differs
by Python's version, so the program prints its SHA-256. The last tenth of the topics is for
validation; paragraphs that were there before are left out, or a model could know them by heart.

Two models that count, a bigram and a trigram one, are the baselines. The GPT is a `repeat` of
transformer layers with rotary positions; fifty steps are one compiled call, after each of which the
run is saved: `--resume` goes on with a run that was stopped, bit for bit as if it had not been, and
with one that is finished goes on to write. Text is decoded with the keys and values of all tokens
so far as state, by a compiled step for each token or by one scan, and, for comparison, without.

The program prints the bits per character of the three models on the validation text, the text that
is written, and characters per second; its figure shows the losses by step.
"""

import argparse
import math
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from disk import save
from python_topics import Data, best_counting_model, bits, decode, encode, load
from torch import Tensor
from tqdm import tqdm

import funcnet as fn

RATE, WEIGHT_DECAY = 3e-3, 0.1
WARMUP = 100


class Size(NamedTuple):
    """Of the net, and of its training."""

    layers: int
    width: int
    heads: int
    context: int
    """The characters that the net sees at most."""
    batch: int
    steps: int
    every: int
    """The steps of a compiled call, after which the run is measured and saved."""


FULL = Size(layers=4, width=128, heads=4, context=256, batch=8, steps=1000, every=50)
SMALL = Size(layers=2, width=32, heads=2, context=32, batch=8, steps=40, every=10)


def gpt(size: Size, classes: int, cache: int | None = None) -> fn.Layer:
    """From characters (batch, tokens) to logits (batch * tokens, classes).

    With a cache it goes on after the tokens of the calls before: the same params, but with state.
    """
    block = fn.transformer_encoder_layer(
        size.heads,
        4 * size.width,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
        is_causal=True,
        rotary=fn.rotary(),
        cache=cache,
    )
    return fn.serial(
        embedding=fn.embedding(classes, size.width),
        blocks=fn.repeat(block, size.layers),
        norm=fn.layer_norm(),
        head=fn.linear(classes),
        tokens=fn.flatten(0, -2),
    )


LOSS = fn.cross_entropy()


def schedule(steps: int) -> Callable[[Tensor], Tensor]:
    """A learning rate that rises for `WARMUP` steps and falls as a cosine to a twentieth."""

    def rate(step: Tensor) -> Tensor:
        falling = 0.05 + 0.95 * (1 + torch.cos(math.pi * step / steps)) / 2
        return RATE * torch.clamp((step + 1) / WARMUP, max=1.0) * falling

    return rate


def measure(net: fn.Layer, params: fn.Params, text: Tensor, context: int) -> float:
    """Bits per character of ``text[context // 2 + 1:]``, each given half a context at least.

    The windows that the net sees overlap by a half, of which it has the second one to predict.
    """
    half, values = context // 2, []
    loss = fn.cross_entropy(reduction="none")
    for windows in text.unfold(0, context + 1, half).split(16):
        logits, _ = net.apply(params, windows[:, :-1])
        losses = loss.apply(logits, windows[:, 1:].flatten())
        values.append(losses.reshape(-1, context)[:, half:].flatten())
    return torch.cat(values).mean().item() / math.log(2)


class Run(NamedTuple):
    """How far training is, and the bits per character after each compiled call until then."""

    state: fn.TrainState
    train: list[float]
    validation: list[float]


def start(net: fn.Layer, optimizer: fn.Optimizer, seed: int) -> Run:
    example = torch.zeros(1, 1, dtype=torch.int64)
    return Run(fn.init_train_state(net, optimizer, fn.key(seed), example), [], [])


def stored(path: Path, settings: str, begin: Run) -> Run:
    """The run of a file, which must be one of these settings; the program ends otherwise."""
    if not path.exists():
        sys.exit(f"there is no run to go on with, no file {path}")
    found = fn.load(path, at="settings")
    if found != settings:
        sys.exit(f"{path} is a run of other settings, {found}, not {settings}")
    losses = fn.load(path, at="run.train"), fn.load(path, at="run.validation")
    return Run(fn.load(path, like=begin.state, at="run.state"), *losses)


def train(size: Size, data: Data, seed: int, path: Path, settings: str, resume: bool) -> Run:
    """Train, or go on with the run of the file, which is written after each compiled call."""
    net = gpt(size, len(data.characters))
    optimizer = fn.adamw(schedule(size.steps), betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    step = fn.train_step(net, LOSS, optimizer)

    def one(state: fn.TrainState, text: Tensor) -> tuple[fn.TrainState, Tensor]:
        """A step, on a batch that is a function of the key and of the number of the step."""
        key = fn.fold_in(fn.fold_in(state.key, "batches"), state.step)
        first = fn.random.randint(key, (size.batch, 1), 0, len(text) - size.context)
        windows = text[first + torch.arange(size.context + 1)]
        state, metrics = step(state, (windows[:, :-1], windows[:, 1:].flatten()))
        return state, metrics["loss"]

    @partial(fn.jit, donate=0)
    def steps(state: fn.TrainState, text: Tensor) -> tuple[fn.TrainState, Tensor]:
        state, losses = fn.scan(lambda state, _: one(state, text), state, length=size.every)
        return state, losses.mean()

    run = start(net, optimizer, seed)
    run = stored(path, settings, run) if resume else run
    begin = int(run.state.step)
    with tqdm(total=size.steps, initial=begin, desc=f"seed {seed}", unit="step") as progress:
        for _ in range(begin, size.steps, size.every):
            state, loss = steps(run.state, data.train)
            measured = measure(net, state.params, data.validation, size.context)
            run = Run(state, [*run.train, loss.item() / math.log(2)], [*run.validation, measured])
            fn.save(path, {"settings": settings, "run": run})
            progress.update(size.every)
            progress.set_postfix(validation=f"{measured:.2f} bits")
    return run


Writer = Callable[[fn.Params, Tensor, Tensor, Tensor], Tensor]
"""From params, given (tokens + 1,), keys (tokens, 2) and the temperature to a text (tokens + 1,).

The given ones are the first characters, and then -1 for those that are drawn.
"""


def draw_token(logits: Tensor, given: Tensor, key: Tensor, temperature: Tensor) -> Tensor:
    """The next character, (1,), from logits (1, classes)."""
    return torch.where(given < 0, fn.random.categorical(key, logits / temperature), given)


def with_cache(size: Size, classes: int) -> tuple[Writer, Writer]:
    """Decoding whose state has the keys and values of the characters up to now.

    A compiled step for each character, and all of them as one program.
    """
    net = gpt(size, classes, cache=size.context)
    _, empty = net.init(fn.key(0), torch.zeros(1, 1, dtype=torch.int64))

    def one(
        params: fn.Params, memory: fn.Params, token: Tensor, given: Any, temperature: Tensor
    ) -> tuple[fn.Params, Tensor]:
        logits, memory = net.apply(params, token[None], memory)
        return memory, draw_token(logits, *given, temperature)

    step = fn.jit(one, donate=1)

    def by_steps(params: fn.Params, given: Tensor, keys: Tensor, temperature: Tensor) -> Tensor:
        memory, tokens = fn.tree.map(torch.clone, empty), [given[:1]]
        for each in zip(given[1:], keys, strict=True):
            memory, token = step(params, memory, tokens[-1], each, temperature)
            tokens.append(token)
        return torch.cat(tokens)

    @fn.jit
    def by_scan(params: fn.Params, given: Tensor, keys: Tensor, temperature: Tensor) -> Tensor:
        def body(carry: Any, given: Any) -> tuple[Any, Tensor]:
            carry = one(params, *carry, given, temperature)
            return carry, carry[1]

        _, tokens = fn.scan(body, (empty, given[:1]), (given[1:], keys))
        return torch.cat([given[:1], tokens[:, 0]])

    return by_steps, by_scan


def without_cache(size: Size, classes: int) -> Writer:
    """Decoding by all of the net for each character, at the length of the whole text."""
    net = gpt(size, classes)

    @partial(fn.jit, donate=1)
    def step(
        params: fn.Params, text: Tensor, place: Tensor, given: Any, temperature: Tensor
    ) -> Tensor:
        logits, _ = net.apply(params, text[None, :-1])
        token = draw_token(logits[place[None]], *given, temperature)
        return torch.where(torch.arange(len(text)) == place + 1, token, text)

    def write(params: fn.Params, given: Tensor, keys: Tensor, temperature: Tensor) -> Tensor:
        text = given.clamp(min=0)
        for place, *each in zip(torch.arange(len(keys)), given[1:], keys, strict=True):
            text = step(params, text, place, tuple(each), temperature)
        return text

    return write


def write(params: fn.Params, size: Size, data: Data, options: argparse.Namespace) -> None:
    """Print a text, and how fast it is written in three ways."""
    prompt = encode(options.prompt, data.characters)
    given = torch.nn.functional.pad(prompt, (0, size.context + 1 - len(prompt)), value=-1)
    keys = fn.random.split(fn.fold_in(fn.key(options.seed), "text"), size.context)
    classes, rates = len(data.characters), []
    # As a tensor: a program that is given tensors alone is called sooner.
    temperature = torch.tensor(options.temperature)
    for writer in (*with_cache(size, classes), without_cache(size, classes)):
        text = writer(params, given, keys, temperature)
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            writer(params, given, keys, temperature)
            seconds.append(time.perf_counter() - begin)
        rates.append(size.context / min(seconds))
        if len(rates) == 1:
            print(f"\n{decode(text, data.characters)}\n")
    steps, scan, whole = rates
    print(
        f"characters per second: {steps:.0f} by a compiled step for each, {scan:.0f} by one scan,"
        f" {whole:.0f} without the cache; {steps / whole:.1f} and {scan / whole:.1f} times as fast"
    )


def draw(run: Run, size: Size, baselines: dict[str, float], path: Path) -> None:
    steps = range(size.every, size.steps + 1, size.every)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(steps, run.train, label="GPT, training text")
    axes.plot(steps, run.validation, label="GPT, validation text")
    for (name, value), style in zip(baselines.items(), (":", "--"), strict=True):
        axes.axhline(value, color="gray", linestyle=style, label=name)
    axes.set(
        title="Characters of Python's documentation", xlabel="step", ylabel="bits per character"
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, path)


def parse() -> tuple[argparse.Namespace, Size]:
    parser = argparse.ArgumentParser(
        description="Train a GPT on the characters of Python's own documentation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the parameters, the batches and the text")
    steps = f"of training, a multiple of {FULL.every} (default: {FULL.steps})"
    add("--steps", type=int, default=argparse.SUPPRESS, help=steps)
    small = f"a net and a run for a test; steps are a multiple of {SMALL.every}"
    add("--small", action="store_true", help=small)
    add("--prompt", default="The ", help="how the text begins that is written")
    add("--temperature", type=float, default=0.7, help="of its characters; low ones are sure")
    where = "where the run is saved; a run that is there is overwritten, unless --resume is given"
    add("--checkpoint", type=Path, default=Path("char_lm.safetensors"), metavar="FILE", help=where)
    add("--resume", action="store_true", help="go on with the saved run, or write if it is done")
    add("--output", type=Path, default=Path("char_lm.png"), help="the figure's file")
    options = parser.parse_args()
    size = SMALL if options.small else FULL
    size = size._replace(steps=getattr(options, "steps", size.steps))
    if size.steps < 1 or size.steps % size.every:
        parser.error(f"--steps must be a multiple of {size.every}")
    if not 1 <= len(options.prompt) <= size.context:
        parser.error(f"--prompt must have 1 to {size.context} characters")
    if options.temperature <= 0:
        parser.error("--temperature must be above 0")
    return options, size


def main() -> None:
    options, size = parse()
    begin = time.perf_counter()
    data, digest = load()
    # All models are measured on the same characters: `measure` takes half a context at a time.
    half = size.context // 2
    data = data._replace(
        validation=data.validation[: (len(data.validation) - 1) // half * half + 1]
    )
    classes = len(data.characters)
    print(
        f"Python {platform.python_version()}, SHA-256 of its topics {digest}\n{len(data.train)} "
        f"characters for training, {len(data.validation)} for validation, {classes} different ones"
    )
    baselines = {}
    for order, name in ((2, "bigrams"), (3, "trigrams")):
        model = best_counting_model(data.train, classes, order)
        baselines[name] = bits(model, data.validation, half + 1)
    settings = f"seed {options.seed}, {size}, topics {digest}"
    run = train(size, data, options.seed, options.checkpoint, settings, options.resume)
    seconds = time.perf_counter() - begin
    draw(run, size, baselines, options.output)
    models = {**baselines, "GPT": run.validation[-1]}
    measured = ", ".join(f"{name} {value:.3f}" for name, value in models.items())
    print(f"validation bits per character: {measured}; {seconds:.0f} s with compilation")
    write(run.state.params, size, data, options)
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
