"""GPT-2 of layers of funcnet, held to `transformers.GPT2LMHeadModel` with the same parameters."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from networks.transformers import gpt
from torch import Tensor

import funcnet as fn

# From the names of GPT-2's parameters, but for their prefix, to ours.
NAMES = {
    r"^wte\.": "embedding.",
    r"^wpe\.": "positions.",
    r"^ln_f\.": "blocks.norm.",
    r"^h\.(\d+)\.ln_([12])\.": r"blocks.layers.\1.norm\2.",
    r"^h\.(\d+)\.attn\.c_attn\.": r"blocks.layers.\1.self_attn.in_proj_",
    r"^h\.(\d+)\.attn\.c_proj\.": r"blocks.layers.\1.self_attn.out_proj.",
    r"^h\.(\d+)\.mlp\.c_fc\.": r"blocks.layers.\1.linear1.",
    r"^h\.(\d+)\.mlp\.c_proj\.": r"blocks.layers.\1.linear2.",
}


def named(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's parameters, or gradients, by the paths of ours.

    The weights of its Conv1D layers, those called c_*, are transposed.
    """
    found = {}
    for name, leaf in leaves.items():
        path = name.removeprefix("transformer.")
        for pattern, ours in NAMES.items():
            path = re.sub(pattern, ours, path)
        found[path] = leaf.t().contiguous() if re.search(r"\.c_\w+\.weight$", name) else leaf
    return found


def errors(dtype: torch.dtype, tokens: int = 16, batch: int = 2, **config: Any) -> dict[str, float]:
    """The greatest differences of logits and gradients, relative to the largest of each tensor.

    Args:
        dtype: of the parameters.
        tokens, batch: the shape of the input.
        config: of `transformers.GPT2Config`; default that of the smallest GPT-2.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**config, attn_implementation="eager")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = GPT2LMHeadModel(config).to(dtype).eval()
        with torch.no_grad():
            # First values, such as zeros, may hide a term of a gradient.
            for parameter in theirs.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        x = torch.randint(config.vocab_size, (batch, tokens))
    y = theirs(x).logits
    dy = fn.random.normal(fn.key(1), y.shape, dtype)
    given = dict(theirs.named_parameters())
    grads = torch.autograd.grad(y, [*given.values()], dy)
    y = y.detach()

    sizes = config.vocab_size, config.n_embd, config.n_head, config.n_layer, config.n_positions
    net = gpt(*sizes, dtype=dtype)
    params, _ = net.init(fn.key(0), x)
    loaded = fn.tree.from_dotted({path: leaf.detach() for path, leaf in named(given).items()})
    fn.tree.check_same_structure(params, loaded, "params of GPT-2")
    ours, pullback, _ = net.vjp(loaded, x, train=False)
    dparams = fn.tree.to_dotted(pullback(dy)[0])
    expected = named(dict(zip(given, grads, strict=True)))
    pairs = {path: (dparams[path], expected[path]) for path in expected} | {"logits": (ours, y)}
    return {
        path: float((own - other).abs().max() / other.abs().max())
        for path, (own, other) in pairs.items()
    }
