"""Random programs for `tests.fuzz`: the text of a pure function, and its arguments.

A program is grown statement by statement. Each statement is run on examples as it is added, and
dropped if torch refuses it, so that shapes and dtypes fit without a model of torch's rules.
"""

import copy
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import funcnet as fn

INGREDIENTS = ("numbers", "orders", "donation", "captured", "writes", "loops", "layers", "draws")
_LARGEST = 1e3
_DTYPES = ("torch.float32", "torch.float64", "torch.int64", "torch.bool", "torch.int32")


class Pair(NamedTuple):
    """A structure for arguments and results."""

    first: Any
    second: Any


# Templates of expressions, with semicolons between. The names in braces are holes, which
# `Scope.fill` fills; a hole that occurs twice has the same text twice. None tells a zero from a
# negative zero, of which Inductor's remainder may give another one.
POINTWISE = """
{x} + {y}; {x} * {y}; {x} - {y}; {f} / ({g}.abs() + 0.5); {x} + {c}; {c} - {f}; {f} / {c}; -{f};
{f} * {f}; {f} ** 3; {f} % 0.75; torch.fmod({f}, 1.5); torch.maximum({x}, {y});
torch.minimum({f}, {g}); torch.where({x} > {y}, {x}, {y}); torch.where({b}, {y}, {c});
torch.where({x} > {c}, {x}, {c}); {x} > {y}; {x} == {y}; {x} <= {c}; {b} & {e}; ~{b}; {b} ^ {e};
{i} % 3; {i} // 2; {i} & {j}; ({i} % 4) << 1; {i} >> 1; ~{i}; {i} | {j}; torch.tanh({f});
{f}.sigmoid(); {f}.abs().sqrt(); torch.exp(-{f}.abs()); {f}.sin(); {f}.relu(); torch.erf({f});
F.gelu({f}); F.softplus({f}); {f}.floor(); {f}.round(); {f}.sign(); {f}.clamp(-1, 0.5);
{f}.square(); torch.log1p({f}.abs()); {f}.isnan(); torch.atan2({f}, {g}.abs() + 0.5);
{x}.to({t}); {x}.to({t});
torch.lerp({f}, {g}, 0.3); torch.addcmul({f}, {f}, {g}, value=0.5); {f}.masked_fill({e}, -1);
torch.full_like({x}, 2); torch.zeros_like({x}) + {y}; {x}.clone(); F.one_hot({i} % 3, 3);
torch.arange({n}) == {i}.unsqueeze(-1); {f}.double() + {g}.to({t}); ({x} > 0).to({t}) * {y};
{f}.expm1().clamp(max=2); F.leaky_relu({f}); torch.rsqrt({f} ** 2 + 1); {f}.nan_to_num() * {y}
"""
REDUCTIONS = """
{x}.sum(); {x}.sum({d}); {x}.sum({ds}, keepdim=True); {f}.mean({ds}, keepdim={z}); {x}.amax({d});
{f}.amin({ds}); {x}.argmax({d}); {x}.argmin({d}, keepdim=True); {x}.max({d}).values;
torch.var_mean({f}, {ds}, correction=0)[0]; torch.var_mean({f}, {d}, keepdim=True)[1];
{f}.var({d}, correction=0); {f}.norm(dim={d}); {f}.softmax({d}); {f}.log_softmax({d}); {f}.max();
{f}.logsumexp({d}); {x}.cumsum({d}); {b}.any({d}); {b}.all(); {f}.prod({d}); ({x} > 0).sum({d});
{f}.argmax(); F.layer_norm({f}, {f}.shape[-1:]); {f}.cumprod({d}); {x}.sort({d}).values;
{x}.sort({d}, descending={z}, stable=True).indices; {x}.argsort({d}, stable=True);
{f}.topk(1, {d}).values; {f}.std({ds}, correction=0); {x}.min({d}).indices; {f}.mean()
"""
PRODUCTS = """
{m} @ {w}; {m} @ {w}; {m}.T @ {m}; {m} @ {m}.T; torch.addmm({v}, {m}, {w}); {h} @ {hw}; {h} @ {w};
torch.bmm({h}, {h}.mT); {m} @ {v}; torch.outer({m}[0], {m}[:, 0]); F.linear({f}, {w}.T);
torch.einsum("ij,kj->ik", {m}, {m}); torch.stack([{m}, {m}]) @ {w}; {f} @ {w}; {f} @ {v};
torch.addmm({m} @ {w}, {m}, {w}, beta=0.5, alpha=2); torch.baddbmm({h} @ {h}.mT, {h}, {h}.mT)
"""
MOVES = """
torch.cat([{x}, {l}], {d}); torch.stack([{x}, {l}], {d}); {x}.flip({d}); {x}.roll({k}, {d});
{x}.gather({d}, {x}.argsort({d}, stable=True)); {x}.index_select({d}, torch.tensor([0, 0]));
{x}[{many} % {x}.shape[0]]; F.pad({x}, (1, 2)); {x}.tril(); torch.repeat_interleave({x}, 2, {d});
{x}.repeat(2, *[1] * ({x}.dim() - 1)); torch.cat([{x}, {x}[{s}]], 0); {x}.cumsum({d}).flip({d});
torch.zeros({x}.shape).scatter_add({d}, {x}.argsort({d}, stable=True), {f});
{x}.index_add({d}, torch.arange({x}.shape[{d}]) // 2, {l}); torch.stack([{x}, {l}]).sum(0)
"""
VIEWS = """
{x}.mT; {x}.transpose({d}, {d2}); {x}[{s}]; {x}[{s}]; {x}[{s}]; {x}.reshape(-1); {x}.flatten();
{x}.expand(2, *{x}.shape); {x}.unsqueeze({u}); {x}.squeeze(); {x}.select({d}, -1); {x}[0]; {x}[1:];
{x}.diagonal(); {x}.unflatten({d}, (-1, 2)); {x}.movedim({d}, {d2}); {x}.narrow({d}, 1, 1);
{x}.view(-1); {x}.split(1, {d})[-1]; {x}.contiguous(); {x}.T.contiguous().T; {x}.unfold({d}, 2, 1);
{x}.reshape({x}.shape[::-1]); {x}[..., -1:]; {x}[None].expand(3, *{x}.shape)[1]; {x}.unbind({d})[0]
"""
# Statements that write to a tensor that the program made in the same scope.
WRITES = """
{o}.add_({y}); {o}.mul_(2); {o}[{s}] = {c}; {o}[{s}].add_(1); {o}.copy_({y}); {o}[{s}] = {y};
{o}.select({d}, 0).add_(1); {o}.view(-1)[::2] = {c}; {o}.mT.mul_(2); {o}.masked_fill_({e}, {c});
{rows}[{rows} > 0] = {c}; {o}.clamp_(max={c}); {o}.zero_(); {o}.diagonal().fill_({c}); {o}.neg_();
{o}.transpose({d}, {d2})[{s}] = {c}; {o}.index_fill_({d}, torch.tensor([0]), 2); {o}.sub_({y} * 2);
{o}.index_add_(0, torch.zeros({o}.shape[0], dtype=torch.int64), {o}.clone()); {o}[0] = {o}[-1];
{o}[torch.tensor([0])] = {c}; {o}.unsqueeze({u}).add_({c}); {o}.relu_(); {o}[{s}].mul_({o}[{s}])
"""
DRAWS = """
fn.random.uniform({key}, {r}); fn.random.normal({key}, {r}); fn.random.bits({key}, {r}) % 1000;
fn.random.normal({key}, {r}, torch.float64); fn.random.permutation({key}, {n});
fn.random.bernoulli({key}, 0.4, {r}); fn.random.randint({key}, {r}, -3, 5);
fn.random.uniform({key}, {r}, torch.float64, -1.0, 2.0); fn.random.permutation({key}, {x});
fn.random.bernoulli({key}, {f}.sigmoid()); fn.random.categorical({key}, {f})
"""
KEYS = """
fn.random.fold_in({key}, {k}); fn.random.split({key}, 3)[{k}]; fn.random.split({key})[0];
fn.random.fold_in({key}, "name"); fn.random.fold_in({key}, {i}.sum() % 100)
"""
NUMBERS = """
{p} + {q}; {p} * {q}; {p} - 2; 2 - {p}; {p} / {q}; {p} // {q}; {p} % {q}; {p} ** 2; -{p}; +{p};
abs({p}); {p} < {q}; {p} == {q}; {p} >= 1; max({p}, {q}); min({p}, 2); round({p}); {p} - True;
divmod({p}, {q})[0]; divmod({p}, 2.5)[1]; {p} / 3; 1.5 * {p}; 7 // {p}; 7.5 % {p}; 3 / {p};
{p} % 3; {p} // -2; {p} != 2; round({p}, 1); not {p}; {p} and {q}; int({p}); float({p}); ~{p};
{p} if {p} > 1 else {q}; math.sqrt(abs({p})); {p} & 3; {p} << 1; 2 ** {p}; {p} * {q} + {p}
"""
MIXED = """
{x} * {p}; {x} + {p}; {p} - {x}; {x} / {p}; {f} / ({p} + 0.25); torch.where({x} > {p}, {p}, {x});
torch.where({b}, {p}, {q}); torch.full_like({f}, {p}); {f}.clamp(max={p}); {p} * {x}.sum();
torch.add({f}, {g}, alpha={p}); {f}.masked_fill({e}, {p}); {x} == {p}; {x} < {p}; {f} ** {p};
torch.lerp({f}, {g}, {p}); {x} // {p}; {x} % {p}; {p} // {x}; torch.full((2, 3), {p});
torch.tensor([{p}, 2]); torch.tensor({p}); {x}.sum() * ({p} * 2); {x} * ({p} / 3) + {q};
{p} ** {f}.abs(); torch.maximum({f}, torch.tensor({p})); {x}[:{p}]; {f}.reshape(-1)[0] + {p};
{b} | {p}; {i} & {p}; {x} - ({p} > 1); torch.stack([{x}.sum() * {p}, {x}.sum()]); {x}.sum(0) - {p}
"""
SLICES = """
0; 1:; ::2; :-1; -1; ..., 0; ..., 1:; None; :, 0; 1::2; :1; ..., ::2; :, None; :0; 1:2, ...; 1:-1
"""

# Which tensors a hole takes: a condition on the tensor and the subject, the first one chosen.
FITS: dict[str, Callable[[Tensor, Tensor], bool]] = {
    "o": lambda each, subject: True,
    "rows": lambda each, subject: each.dim() > 0,
    "x": lambda each, subject: True,
    "f": lambda each, subject: each.is_floating_point(),
    "i": lambda each, subject: each.dtype == torch.int64,
    # By a tensor of no dimensions torch indexes as by a number, which jit cannot read.
    "many": lambda each, subject: each.dtype == torch.int64 and each.dim() > 0,
    "b": lambda each, subject: each.dtype == torch.bool,
    "m": lambda each, subject: each.is_floating_point() and each.dim() == 2,
    "h": lambda each, subject: each.is_floating_point() and each.dim() == 3,
    "y": lambda each, subject: _broadcast(each, subject),
    "g": lambda each, subject: each.is_floating_point() and _broadcast(each, subject),
    "j": lambda each, subject: each.dtype == torch.int64 and _broadcast(each, subject),
    "e": lambda each, subject: each.dtype == torch.bool and _broadcast(each, subject),
    "l": lambda each, subject: each.shape == subject.shape and each.dtype == subject.dtype,
    "w": lambda each, subject: _multiplies(each, subject, 2),
    "hw": lambda each, subject: _multiplies(each, subject, 3) and len(each) == len(subject),
    "v": lambda each, subject: _multiplies(each, subject, 1),
}
_ORDER = list(FITS)


def _broadcast(each: Tensor, subject: Tensor) -> bool:
    pairs = zip(reversed(each.shape), reversed(subject.shape), strict=False)
    return all([a == b or a == 1 or b == 1 for a, b in pairs])


def _multiplies(each: Tensor, subject: Tensor, dim: int) -> bool:
    if each.dim() != dim or each.dtype != subject.dtype or not subject.dim():
        return False
    return each.shape[max(dim - 2, 0)] == subject.shape[-1]


def _templates(table: str) -> list[str]:
    return [" ".join(each.split()) for each in table.split(";")]


@dataclass(frozen=True)
class Leaf:
    """How to make an argument: a tensor, a key or a Python number, with other values each call."""

    kind: str
    shape: tuple[int, ...] = ()
    layout: str = "plain"
    varying: bool = False

    def make(self, rng: random.Random) -> Any:
        """A value of this kind."""
        if self.kind in ("int", "float", "bool"):
            kind = rng.choice(["int", "float", "bool"]) if self.varying else self.kind
            floats = [0.5, 1.5, 2.5, -0.75, 3.25, 0.1, -2.0, 0.0]
            return {"int": rng.randint(-3, 6), "float": rng.choice(floats)}.get(
                kind, rng.random() < 0.5
            )
        if self.kind == "key":
            return fn.key(rng.randrange(1000))
        shape, generator = self.shape, torch.Generator().manual_seed(rng.getrandbits(62))
        whole = {
            "transposed": shape[::-1],
            "strided": (*shape[:-1], 2 * shape[-1]) if shape else shape,
            "offset": (shape[0] + 1, *shape[1:]) if shape else shape,
            "expanded": (1, *shape[1:]) if shape else shape,
        }.get(self.layout, shape)
        drawn = torch.randn(whole, generator=generator, dtype=torch.float64) * 1.5
        if rng.random() < 0.3:
            drawn = (drawn * 4).round() / 4
        dtype = eval(self.kind)
        value = (drawn > 0) if dtype == torch.bool else drawn.to(dtype)
        if self.layout == "parameter":
            return torch.nn.Parameter(value, requires_grad=dtype.is_floating_point)
        if not shape:
            return value
        views = {
            "transposed": lambda: value.permute(*range(value.dim())[::-1]),
            "strided": lambda: value[..., ::2],
            "offset": lambda: value[1:],
            "expanded": lambda: value.expand(shape),
        }
        return views.get(self.layout, lambda: value)()


@dataclass
class Statement:
    """Lines of a program; those of ``after`` follow the indented body of a nested function."""

    lines: list[str]
    body: list["Statement"] = field(default_factory=list)
    after: list[str] = field(default_factory=list)

    def text(self, indent: str) -> list[str]:
        """The lines, indented."""
        inside = [line for each in self.body for line in each.text(indent + "    ")]
        return [indent + line for line in self.lines] + inside + [indent + x for x in self.after]


class Owner:
    """Whether the memory that some tensors share may be written in place."""

    writable = True


class Variable(NamedTuple):
    """An expression that has a value; ``owner`` if the program made it in this scope."""

    text: str
    value: Any
    owner: Owner | None = None
    local: bool = True


def _parts(text: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The expressions of the leaves of a structure."""
    if isinstance(value, (Tensor, bool, int, float, Leaf)):
        yield text, value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _parts(f"{text}[{name!r}]", each)
    elif isinstance(value, Pair):
        yield from _parts(f"{text}.first", value.first)
        yield from _parts(f"{text}.second", value.second)
    elif isinstance(value, (list, tuple)):
        for place, each in enumerate(value):
            yield from _parts(f"{text}[{place}]", each)


def _packed(rng: random.Random, texts: list[str]) -> str:
    """The text of a random structure of some expressions."""
    if len(texts) == 1 and rng.random() < 0.6:
        return texts[0]
    if len(texts) > 2 and rng.random() < 0.5:
        cut = rng.randrange(1, len(texts))
        texts = [_packed(rng, texts[:cut]), *texts[cut:]]
    kind = rng.choice(["tuple", "list", "dict", "pair"])
    if kind == "pair" and len(texts) <= 2:
        return f"Pair({', '.join((texts + ['None'])[:2])})"
    if kind == "dict":
        names = rng.sample("abcdefghijklmn", len(texts))
        return f"{{{', '.join([f'{n!r}: {t}' for n, t in zip(names, texts, strict=True)])}}}"
    texts = texts + ["None"] if rng.random() < 0.1 else texts
    return f"[{', '.join(texts)}]" if kind == "list" else f"({', '.join(texts)},)"


def _placed(structure: str, texts: list[str]) -> str:
    """A structure of ``@0``, ``@1`` and so on with expressions in their places."""
    return re.sub(r"@(\d+)", lambda match: texts[int(match[1])], structure)


def _storage(value: Any) -> int:
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else 0


class Scope:
    """A function that is being grown: its statements, and the variables that it sees."""

    def __init__(self, rng: random.Random, env: dict[str, Any], without: frozenset[str]) -> None:
        self.rng, self.env, self.without = rng, env, without
        self.variables: list[Variable] = []
        self.keys = [Variable("fn.key(7)", fn.key(7))]
        self.statements: list[Statement] = []
        self.sizes = rng.sample([2, 3, 4, 5], 3) + [rng.choice([0, 1, 1, 2, 7, 17, 33])]
        self.depth = 0
        self.numeric = False
        self.count = iter(range(1, 10_000))

    def child(self) -> "Scope":
        """The body of a nested function, which sees what is outside and may not write to it."""
        inner = copy.copy(self)
        inner.env, inner.depth, inner.statements = dict(self.env), self.depth + 1, []
        inner.variables = [each._replace(owner=None, local=False) for each in self.variables]
        inner.keys = list(self.keys)
        return inner

    def see(self, name: str, value: Any, owner: Owner | None = None) -> None:
        """Put a value in the environment and its parts among the variables."""
        self.env[name] = value
        for text, each in _parts(name, value):
            self.variables.append(Variable(text, each, owner))

    def pick(self, fits: Callable[[Any], bool]) -> Variable | None:
        """A variable that fits, rather one of this scope."""
        found = [each for each in self.variables if fits(each.value)]
        near = [each for each in found if each.local]
        return self.rng.choice(near if near and self.rng.random() < 0.7 else found or [None])

    def tensor(self, fits: Callable[[Tensor], bool] = lambda each: True) -> Variable | None:
        """A tensor that fits."""
        return self.pick(lambda each: isinstance(each, Tensor) and fits(each))

    def fill(self, template: str) -> tuple[str, Variable | None] | None:
        """The template with its holes filled, and its subject; None if nothing fits."""
        rng, subject, texts = self.rng, None, {}
        holes = set(re.findall(r"\{(\w+)\}", template))
        for hole in sorted(holes & FITS.keys(), key=_ORDER.index):
            like = subject.value if subject else torch.zeros(())
            if hole in ("o", "rows"):
                owned = [each for each in self.variables if each.owner and each.owner.writable]
                owned = [each for each in owned if FITS[hole](each.value, like)]
                found = rng.choice(owned or [None])
            else:
                # Without a matrix before it, a factor may be any tensor.
                fits = FITS["x" if subject is None and hole in ("w", "v", "hw") else hole]
                found = self.tensor(lambda each, fits=fits, like=like: fits(each, like))
            if found is None:
                return None
            subject = subject or found
            texts[hole] = found.text
        dims = subject.value.dim() if subject else 0
        axes = rng.sample(range(dims), rng.randint(1, dims)) if dims else []
        number = self.pick(lambda each: not isinstance(each, Tensor))
        another = self.pick(lambda each: not isinstance(each, Tensor))
        if holes & {"p", "q"} and (number is None or another is None):
            return None
        sizes = [size for size in self.sizes if size < 20]
        texts |= {
            "c": rng.choice(["2", "-1", "0.5", "1.5", "-0.25", "3"]),
            "d": str(rng.randrange(-dims, dims) if dims else 0),
            "d2": str(rng.randrange(dims) if dims else 0),
            "ds": str(tuple(axes)),
            "u": str(rng.randint(-dims - 1, dims)),
            "s": rng.choice(_templates(SLICES)),
            "k": str(rng.randint(0, 2)),
            "n": str(rng.choice(sizes)),
            "r": str(tuple(rng.choices(sizes, k=rng.randint(0, 2)))),
            "t": rng.choice(_DTYPES),
            "z": str(rng.random() < 0.5),
            "key": rng.choice(self.keys).text,
            "p": number.text if number else "",
            "q": another.text if another and rng.random() < 0.7 else rng.choice(["2", "0.5", "3"]),
        }
        return re.sub(r"\{(\w+)\}", lambda match: texts[match[1]], template), subject

    def run(self, statement: Statement) -> bool:
        """Whether a statement runs on the examples; it is kept if it does."""
        try:
            with torch.no_grad():
                exec("\n".join(statement.text("")), self.env)
        except Exception:
            return False
        self.statements.append(statement)
        return True

    def tame(self, value: Any) -> bool:
        """Whether a value is small enough to compute on with."""
        if isinstance(value, (bool, int, float)):
            return math.isfinite(value) and abs(value) < 1e5
        if not isinstance(value, Tensor) or value.numel() > 3000 or value.dim() > 5:
            return False
        if value.dtype == torch.bool or not value.numel():
            return True
        finite = not value.is_floating_point() or bool(value.isfinite().all())
        return (finite or self.rng.random() < 0.1) and bool(
            value.nan_to_num(0, 0, 0).abs().max() <= _LARGEST
        )

    def define(self, table: str) -> None:
        """Add ``name = expression`` from a table."""
        filled = self.fill(self.rng.choice(_templates(table)))
        if filled is None:
            return
        (text, subject), name = filled, f"v{next(self.count)}"
        if not self.run(Statement([f"{name} = {text}"])):
            return
        value = self.env[name]
        if not self.tame(value) and table != KEYS:
            self.statements.pop()
        elif table == KEYS:
            self.keys.append(Variable(name, value))
        elif table == VIEWS and subject is not None:
            self.variables.append(Variable(name, value, subject.owner))
            if subject.owner and re.search("reshape|flatten|contiguous", text):
                # A view or a copy, as the strides happen to be: no write may tell which.
                subject.owner.writable = False
        else:
            shared = _storage(value) in [_storage(each.value) for each in self.variables]
            self.variables.append(Variable(name, value, None if shared else Owner()))

    def write(self) -> None:
        """Write in place."""
        if filled := self.fill(self.rng.choice(_templates(WRITES))):
            self.run(Statement([filled[0]]))

    def results(self, statement: Statement, name: str, fresh: bool = False) -> None:
        """Add a statement that defines a structure, and its leaves to the variables."""
        if not self.run(statement):
            return
        found = [*_parts(name, self.env[name])]
        if not found or not all([self.tame(each) for _, each in found]):
            self.statements.pop()
            return
        for text, value in found:
            shared = [each for each in self.variables if _storage(each.value) == _storage(value)]
            for each in shared:
                if each.owner:
                    each.owner.writable = False
            owner = Owner() if fresh and not shared else None
            self.variables.append(Variable(text, value, owner))

    def like(self, wanted: Variable) -> str:
        """An expression of the shape and dtype of a carry."""
        value, text = wanted.value, wanted.text
        if self.rng.random() < 0.6 and (found := self.tensor(lambda e: FITS["l"](e, value))):
            return found.text
        other = self.tensor()
        assert other is not None
        total = f"{other.text}.sum().to({value.dtype})"
        if value.dtype == torch.bool:
            return f"{text} ^ ({other.text}.sum() > 0)"
        if value.is_floating_point():
            return f"torch.tanh({text} + {total})"
        return f"(({text} + {total}) % 7).to({value.dtype})"

    def scan(self) -> None:
        """Add a scan or a fori."""
        rng, n, inner = self.rng, next(self.count), self.child()
        carry = [self.tensor(lambda e: e.numel() < 300) for _ in range(rng.randint(1, 3))]
        counts = rng.random() < 0.25
        leader = None if counts else self.tensor(lambda e: e.dim() > 0 and len(e) < 9)
        xs = [leader] if leader and rng.random() < 0.8 else []
        while xs and rng.random() < 0.4:
            xs.append(self.tensor(lambda e: e.dim() > 0 and len(e) == len(leader.value)))
        if None in carry or None in xs:
            return
        structure = _packed(rng, [f"@{place}" for place in range(len(carry))])
        start = _placed(structure, [each.text for each in carry])
        inner.see(f"c{n}", eval(start, self.env))
        carried = [each for each in inner.variables if each.text.startswith(f"c{n}")]
        options = ""
        if counts:
            inner.see(f"i{n}", torch.tensor(2))
        elif xs:
            packed = _packed(rng, [each.text for each in xs])
            first = lambda x: x[0] if len(x) else torch.zeros(x.shape[1:], dtype=x.dtype)  # noqa: E731
            inner.see(f"x{n}", fn.tree.map(first, eval(packed, self.env)))
            options += ", reverse=True" if rng.random() < 0.3 else ""
            options += f", unroll={rng.choice(['2', '3', 'True'])}" if rng.random() < 0.3 else ""
        else:
            packed, options = "None", f", length={rng.choice([0, 1, 3, 5])}"
        inner.grow(rng.randint(1, 4))
        after = _placed(structure, [inner.like(each) for each in carried])
        if counts:
            low, high = rng.choice([(0, 3), (2, 4), (1, 1), (3, 0), (-2, 2)])
            head, last = f"def body{n}(i{n}, c{n}):", f"    return {after}"
            call = f"s{n} = fn.fori({low}, {high}, body{n}, {start})"
        else:
            ys = [each for _ in range(rng.randint(0, 2)) if (each := inner.tensor())]
            y = _packed(rng, [each.text for each in ys]) if ys else "None"
            head, last = f"def body{n}(c{n}, x{n}):", f"    return {after}, {y}"
            call = f"s{n} = fn.scan(body{n}, {start}, {packed}{options})"
        self.results(Statement([head], inner.statements, [last, call]), f"s{n}")

    def while_loop(self) -> None:
        """Add a while loop, which counts its iterations so that it ends."""
        rng, n, inner = self.rng, next(self.count), self.child()
        carry = [self.tensor(lambda e: e.numel() < 300) for _ in range(rng.randint(1, 2))]
        if None in carry:
            return
        start = f"(torch.tensor(0), {', '.join([each.text for each in carry])})"
        inner.see(f"c{n}", eval(start, self.env))
        carried = [each for each in inner.variables if each.text.startswith(f"c{n}[")][1:]
        goes_on = f"c{n}[0] < {rng.choice([0, 1, 2, 4])}"
        if rng.random() < 0.5:
            goes_on = f"({goes_on}) & ({rng.choice(carried).text}.sum() < 2.3)"
        test = Statement([f"def test{n}(c{n}):", f"    return {goes_on}"])
        inner.grow(rng.randint(1, 4))
        after = ", ".join([f"c{n}[0] + 1", *[inner.like(each) for each in carried]])
        call = f"s{n} = fn.while_loop(test{n}, body{n}, {start})"
        last = [f"    return ({after})", call]
        if self.run(test):
            self.results(Statement([f"def body{n}(c{n}):"], inner.statements, last), f"s{n}")

    def cond(self) -> None:
        """Add branches, which see what is outside."""
        rng, n = self.rng, next(self.count)
        wanted = [self.tensor(lambda e: e.numel() < 300) for _ in range(rng.randint(1, 3))]
        decides = self.tensor(lambda e: not e.is_complex())
        if None in wanted or decides is None:
            return
        names = [f"branch{n}_{place}" for place in range(rng.choice([2, 2, 3]))]
        for name in names:
            inner = self.child()
            inner.grow(rng.randint(0, 3))
            result = ", ".join([inner.like(each) for each in wanted])
            if not self.run(
                Statement([f"def {name}():"], inner.statements, [f"    return {result},"])
            ):
                return
        total = f"{decides.text}.sum()"
        call = f"fn.cond({total} > 0.1, {', '.join(names)})"
        if len(names) > 2:
            call = f"fn.switch(({total} * 2).nan_to_num().long() % 4 - 1, [{', '.join(names)}])"
        self.results(Statement([f"s{n} = {call}"]), f"s{n}")

    def vmap(self) -> None:
        """Add a vmap."""
        rng, n, inner = self.rng, next(self.count), self.child()
        leader = self.tensor(lambda e: e.dim() > 0 and 0 < max(e.shape) < 40)
        if leader is None:
            return
        length = rng.choice([size for size in leader.value.shape if size] or [1])
        mapped = [self.tensor(lambda e: length in e.shape) for _ in range(rng.randint(1, 3))]
        if None in mapped:
            return
        axes, calls, names = [], [], []
        for place, each in enumerate(mapped):
            axis = rng.choice([a for a, size in enumerate(each.value.shape) if size == length])
            example = each.value.select(axis, 0)
            if place and rng.random() < 0.25:
                axes, example = [*axes, "None"], each.value
            else:
                axes.append(str(axis - each.value.dim() if rng.random() < 0.3 else axis))
            name, call = f"x{n}_{place}", each.text
            if rng.random() < 0.2:
                example, call = {"p": example}, f"{{'p': {call}}}"
                axes[-1] = f"{{'p': {axes[-1]}}}" if rng.random() < 0.7 else axes[-1]
            inner.see(name, example)
            names.append(name)
            calls.append(call)
        if rng.random() < 0.3 and "draws" not in self.without:
            names, axes = [*names, f"k{n}"], [*axes, "0"]
            calls.append(f"fn.random.split({rng.choice(self.keys).text}, {length})")
            inner.env[f"k{n}"] = fn.key(n)
            inner.keys = [Variable(f"k{n}", fn.key(n))]
        inner.grow(rng.randint(1, 4))
        out = [inner.tensor() for _ in range(rng.randint(1, 3))]
        places = [str(rng.randint(-e.value.dim() - 1, e.value.dim())) for e in out]
        places = ["None" if rng.random() < 0.1 else each for each in places]
        last = f"    return {', '.join([each.text for each in out])},"
        options = f"in_axes=({', '.join(axes)},)" if set(axes) != {"0"} else ""
        if rng.random() < 0.5:
            options += f"{', ' if options else ''}out_axes=({', '.join(places)},)"
        call = f"s{n} = fn.vmap(body{n}{', ' if options else ''}{options})({', '.join(calls)})"
        head = f"def body{n}({', '.join(names)}):"
        self.results(Statement([head], inner.statements, [last, call]), f"s{n}")

    def net(self) -> str:
        """The text of a net, some of it rematerialised."""
        rng, width = self.rng, self.rng.choice([1, 2, 3, 5])
        kinds = ["fn.tanh()", "fn.relu()", "fn.layer_norm()", "fn.dropout(0.4)", "fn.batch_norm()"]
        kinds += [f"fn.linear({width})", "fn.gelu()", "fn.softmax()", "fn.silu()"]
        kinds += [f"fn.residual(fn.serial(fn.linear({width}), fn.tanh(), fn.linear({width})))"]
        parts = [f"fn.linear({width})", *rng.choices(kinds, k=rng.randint(1, 3))]
        text = f"fn.serial({', '.join(parts)}, fn.linear({rng.choice([1, 2, 4])}))"
        policy = f", policy=[{str(rng.randint(0, 1))!r}]" if rng.random() < 0.4 else ""
        return f"fn.remat({text}{policy})" if rng.random() < 0.4 else text

    def layers(self) -> None:
        """Add a forward and a backward pass, or steps of training."""
        rng, n, key = self.rng, next(self.count), self.rng.choice(self.keys).text
        x = self.tensor(lambda e: FITS["m"](e, e))
        if x is None:
            return
        lines = [f"net{n} = {self.net()}"]
        if rng.random() < 0.5:
            lines += [
                f"p{n}, s{n} = net{n}.init({key}, {x.text})",
                f"y{n}, pull{n}, s{n} = net{n}.vjp(p{n}, {x.text}, s{n}, key={key})",
                f"r{n} = fn.tree.leaves((y{n}, pull{n}(torch.tanh(y{n})), s{n}))",
            ]
        else:
            optimizer = rng.choice(["fn.sgd(0.1)", "fn.sgd(0.1, 0.9)", "fn.adam(0.01)"])
            lines += [
                f"step{n} = fn.train_step(net{n}, fn.mse(), {optimizer})",
                f"t{n} = fn.init_train_state(net{n}, {optimizer}, {key}, {x.text})",
            ]
            target = f"torch.ones_like(net{n}.apply(t{n}.params, {x.text}, t{n}.state)[0])"
            batch = f"({x.text}, {target})"
            if rng.random() < 0.5:
                batches = f"fn.tree.map(lambda x: torch.stack([x, x * 0.5, -x]), {batch})"
                lines += [f"t{n}, m{n} = fn.scan(step{n}, t{n}, {batches})"]
            else:
                lines += [f"t{n}, m{n} = step{n}(t{n}, {batch})"]
            lines += [f"r{n} = fn.tree.leaves((t{n}.params, t{n}.state, m{n}))"]
        self.results(Statement(lines), f"r{n}")

    def grow(self, count: int) -> None:
        """Add about so many statements."""
        kinds: dict[Callable[[], None], float] = {
            lambda: self.define(POINTWISE): 5,
            lambda: self.define(REDUCTIONS): 3,
            lambda: self.define(PRODUCTS): 2.5,
            lambda: self.define(MOVES): 2,
            lambda: self.define(VIEWS): 3,
            self.write: 0 if "writes" in self.without else 3,
            lambda: self.define(DRAWS): 0 if "draws" in self.without else 1,
            lambda: self.define(KEYS): 0 if "draws" in self.without else 0.7,
            self.layers: 0 if "layers" in self.without or self.depth > 1 else 1,
        }
        if self.depth < 3 and "loops" not in self.without:
            kinds |= {self.scan: 1.6, self.vmap: 1.4, self.while_loop: 0.8, self.cond: 1}
        if self.numeric:
            kinds = {kind: weight / 5 for kind, weight in kinds.items()}
            kinds |= {lambda: self.define(NUMBERS): 3.5, lambda: self.define(MIXED): 4}
        goal = len(self.statements) + count
        for _ in range(6 * count):
            if len(self.statements) >= goal:
                return
            self.rng.choices([*kinds], [*kinds.values()])[0]()


@dataclass
class Program:
    """A function of some arguments, and how it is called."""

    seed: str
    setup: list[str]
    captured: dict[str, Leaf]
    args: list[Any]
    statements: list[Statement]
    outputs: list[str]
    donate: tuple[int, ...]
    calls: int
    numeric: bool
    reorder: bool
    with_grad: bool

    def text(self) -> str:
        """The program as Python, and its arguments as comments."""
        names = [f"a{place}" for place in range(len(self.args))]
        held = [f"# {name}: {leaf}" for name, leaf in self.captured.items()]
        given = [f"# {name}: {arg}" for name, arg in zip(names, self.args, strict=True)]
        body = [line for each in self.statements for line in each.text("    ")]
        result = _packed(random.Random(self.seed), self.outputs)
        head = [
            *held,
            *self.setup,
            *given,
            f"# donate={self.donate}",
            f"def f({', '.join(names)}):",
        ]
        return "\n".join([*head, *body, f"    return {result}"])

    def namespace(self) -> dict[str, Any]:
        """The names that the function sees, and the function, ``f``."""
        env = environment()
        env |= {name: leaf.make(self.rng("held")) for name, leaf in self.captured.items()}
        exec(self.text(), env)
        return env

    def rng(self, what: Any) -> random.Random:
        """The source of some values."""
        return random.Random(f"{self.seed} {what}")

    def arguments(self, call: int) -> list[Any]:
        """The arguments of a call, made anew each time."""
        return [_made(arg, self.rng(f"arguments {call}"), self.reorder) for arg in self.args]


def environment() -> dict[str, Any]:
    """The names that every program sees."""
    return {"torch": torch, "fn": fn, "F": F, "math": math, "Pair": Pair}


def _made(arg: Any, rng: random.Random, reorder: bool) -> Any:
    """The value of an argument; ``reorder`` shuffles the order in which dicts are filled."""
    if isinstance(arg, Leaf):
        return arg.make(rng)
    if isinstance(arg, dict):
        made = {name: _made(each, rng, reorder) for name, each in arg.items()}
        return dict(rng.sample([*made.items()], len(made))) if reorder else made
    if isinstance(arg, Pair):
        return Pair(_made(arg.first, rng, reorder), _made(arg.second, rng, reorder))
    return None if arg is None else type(arg)([_made(each, rng, reorder) for each in arg])


def grow_program(seed: int, number: int, without: frozenset[str] = frozenset()) -> Program:
    """Program ``number`` of a seed."""
    name = f"{seed}/{number}"
    rng = random.Random(name)
    scope = Scope(rng, environment(), without)
    scope.numeric = "numbers" not in without and rng.random() < 0.25

    def leaf(held: bool = False) -> Leaf:
        kind = rng.choice(_DTYPES[:1] * 8 + _DTYPES[1:4] * 2 + _DTYPES[4:])
        layouts = ["plain"] * 4 + ["transposed", "strided", "offset"]
        layouts += ["parameter", "parameter"] if held else ["expanded"]
        shape = tuple(rng.choices(scope.sizes, k=rng.choice([0, 1, 1, 2, 2, 2, 3, 3])))
        return Leaf(kind, shape, rng.choice(layouts))

    captured, setup = {}, []
    if "captured" not in without:
        captured = {f"h{place}": leaf(held=True) for place in range(rng.randint(0, 2))}
        views = [".mT", ".detach()", "[1:]", "[..., ::2]"]
        large = [name for name, each in captured.items() if len(each.shape) > 1]
        setup = [f"w{name} = {name}{rng.choice(views)}" for name in large if rng.random() < 0.4]
    leaves = [leaf() for _ in range(rng.randint(2, 4))]
    if "draws" not in without:
        leaves += [Leaf("key")] * (rng.random() < 0.4)
    if scope.numeric:
        kinds = [rng.choice(["int", "float", "bool"]) for _ in range(rng.randint(1, 3))]
        leaves += [Leaf(kind, varying=rng.random() < 0.2) for kind in kinds]
    args: list[Any] = []
    while leaves:
        taken = leaves[: rng.randint(1, 3)]
        leaves = leaves[len(taken) :]
        places = _packed(rng, [f"@{place}" for place in range(len(taken))])
        texts = [f"taken[{place}]" for place in range(len(taken))]
        args.append(eval(_placed(places, texts), {"taken": taken, "Pair": Pair}))
    program = Program(name, setup, captured, args, [], [], (), rng.randint(2, 3), scope.numeric,
                      "orders" not in without, rng.random() < 0.5)  # fmt: skip
    scope.env |= {name: each.make(program.rng("held")) for name, each in captured.items()}
    exec("\n".join(setup), scope.env)
    for held in (*captured, *[each.split()[0] for each in setup]):
        scope.see(held, scope.env[held])
    for place, value in enumerate(program.arguments(0)):
        _see_argument(scope, f"a{place}", value, args[place])
    inputs = list(scope.variables)
    scope.grow(rng.randint(5, 12))
    program.statements = scope.statements
    found = [each.text for each in scope.variables[len(inputs) :]]
    count = min(len(found), rng.randint(3, 9))
    program.outputs = [*rng.sample(found, count), *[each.text for each in rng.sample(inputs, 1)]]
    program.outputs += rng.sample(program.outputs, 1) if rng.random() < 0.2 else []
    program.outputs += [f"a{rng.randrange(len(args))}"] if rng.random() < 0.2 else []
    if "donation" not in without and rng.random() < 0.35:
        program.donate = tuple(rng.sample(range(len(args)), rng.randint(1, len(args))))
    return program


def _see_argument(scope: Scope, name: str, value: Any, arg: Any) -> None:
    """Put an argument in the scope: keys apart, for they are no tensors to compute with."""
    scope.env[name] = value
    for text, leaf in _parts(name, arg):
        seen = scope.keys if leaf.kind == "key" else scope.variables
        seen.append(Variable(text, eval(text, scope.env)))
