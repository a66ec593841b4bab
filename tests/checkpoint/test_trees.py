"""`save` and `load`: what comes back is what was given, for any tree."""

import json
import math
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import optree
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import funcnet as fn

pytestmark = pytest.mark.cpu_only

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32),
    *(torch.uint64, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    *(torch.float8_e8m0fnu, torch.complex64, torch.complex128),
]


UNKNOWN = torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
"""The format has its dtype, but packs two numbers in what torch calls one."""

WITHOUT_MEMORY = torch.ones(3)
WITHOUT_MEMORY.untyped_storage().resize_(0)
with FakeTensorMode():
    FAKE = torch.ones(3)


class Moments(NamedTuple):
    step: object
    mu: object
    nu: object = ()


def bits(tensor):
    """The bytes of a tensor, so that NaN equals itself."""
    # contiguous() leaves the strides of an empty tensor as they are.
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def same(a, b):
    """Whether two leaves are the same, bit for bit."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and (a == b or a != a)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def assert_same(a, b):
    leaves, treedef = optree.tree_flatten(a)
    others, other = optree.tree_flatten(b)
    assert treedef == other
    assert all(map(same, leaves, others))


def random_tensor(dtype, shape, seed=0):
    """A tensor of random bytes."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(0, high, (size,), generator=generator, dtype=torch.uint8)
    return data.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


tensors = st.builds(
    random_tensor,
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.integers(0, 99),
)
laid_out = tensors.flatmap(
    lambda t: st.sampled_from(
        [t, t.mT if t.dim() > 1 else t, t[::2] if t.dim() else t, t[None].expand(2, *t.shape)]
    )
)
numbers = st.one_of(
    st.booleans(), st.integers(), st.floats(), st.text(), st.just("é \U0001f600 \ud800 \0")
)
names = st.one_of(
    st.text(st.characters(exclude_characters=".", exclude_categories=["Cs"]), min_size=1),
    st.sampled_from(["weight", "0", "data_offsets", "a b", '"', "\\", "{", "é", "\n", "p.q", "."]),
)
trees = st.recursive(
    st.one_of(laid_out, numbers, st.none()),
    lambda children: st.one_of(
        st.dictionaries(names, children, max_size=4),
        st.dictionaries(names, children, max_size=3).map(OrderedDict),
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.tuples(children, children).map(lambda pair: Moments(*pair)),
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(trees, st.sampled_from([None, 1, 40, 1000]), st.booleans())
def test_what_was_saved_is_loaded(tree, max_shard_bytes, checksum):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tree.safetensors")
        fn.save(path, tree, max_shard_bytes=max_shard_bytes, checksum=checksum)
        assert_same(tree, fn.load(path, like=tree))
        plain = fn.load(path)
        assert_same(plain_tree(tree), plain)
        fn.save(path, plain)
        assert_same(plain, fn.load(path, like=plain))
        assert len([*Path(folder).iterdir()]) == 1


def plain_tree(tree):
    """What `load` gives without ``like``: NamedTuples are dicts, and dicts plain ones."""
    if hasattr(tree, "_asdict"):
        tree = tree._asdict()
    if isinstance(tree, dict):
        return {name: plain_tree(child) for name, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([plain_tree(child) for child in tree])
    return tree


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_readers_see_the_same_tensors_and_their_files_can_be_read(tmp_path, dtype):
    shapes = [(3, 5), (), (0, 2), (64,), (1,), (2, 1, 3)]
    flat = {f"p.{n}": random_tensor(dtype, shape, n) for n, shape in enumerate(shapes)}
    fn.save(tmp_path / "ours", fn.tree.from_dotted(flat))
    read = load_file(tmp_path / "ours")
    if dtype == torch.complex128:
        read = {name: torch.view_as_complex(tensor) for name, tensor in read.items()}
    else:
        save_file(flat, tmp_path / "theirs")
        assert_same(fn.tree.from_dotted(flat), fn.load(tmp_path / "theirs"))
    assert_same(flat, read)


def test_a_train_state_is_named_by_its_dotted_paths(tmp_path):
    net = fn.serial(fn.linear(3), fn.batch_norm(), fn.linear(2))
    optimizer = fn.adamw(lambda step: 0.1 / (step + 1))
    state = fn.init_train_state(net, optimizer, fn.key(0), torch.ones(4, 5))
    fn.save(tmp_path / "state.safetensors", state)
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        names, metadata = {*file.keys()}, file.metadata()
    assert {"params.0.weight", "state.1.running_mean", "key", "step"} < names
    assert "opt_state.scale_by_adam.mu.2.bias" in names
    assert metadata["format"] == "pt"
    assert json.loads(metadata["funcnet"])["version"] == 1
    loaded = fn.load(tmp_path / "state.safetensors", like=state)
    assert type(loaded) is fn.TrainState
    assert_same(state, loaded)
    params = fn.load(tmp_path / "state.safetensors", like=state.params, at="params")
    assert_same(state.params, params)


def test_a_part_is_loaded_by_its_path(tmp_path):
    tree = {"a": {"w": torch.ones(2), "n": 3, "l": [1.0, 2.0]}, "ab": torch.zeros(1), "": "x"}
    fn.save(tmp_path / "t", tree)
    assert_same(tree["a"], fn.load(tmp_path / "t", at="a"))
    assert_same(tree["a"]["w"], fn.load(tmp_path / "t", at="a.w"))
    assert fn.load(tmp_path / "t", at="a.l") == [1.0, 2.0]
    assert fn.load(tmp_path / "t", at="a.n", like=0) == 3
    with pytest.raises(
        ValueError, match=r"load: there is nothing at 'b' in .*t, which has \['', 'a'"
    ):
        fn.load(tmp_path / "t", at="b")


@pytest.mark.parametrize(
    "tree", [torch.ones(3), 5, None, (), {}, [None, {}], "text", 0.0], ids=repr
)
def test_a_tree_may_be_a_single_leaf_or_empty(tmp_path, tree):
    fn.save(tmp_path / "t", tree)
    assert_same(tree, fn.load(tmp_path / "t"))
    assert_same(tree, fn.load(tmp_path / "t", like=tree))


def test_keys_with_dots_in_them_come_back_if_save_wrote_them(tmp_path):
    flat = dict(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)).state_dict())
    tree = {"module": flat, "rates": {"0.1": [1, {"a.b.c": 2}], "1.5": {}}, "x.y": {"z": 3}}
    fn.save(tmp_path / "ours", tree)
    assert_same(tree, fn.load(tmp_path / "ours"))
    assert_same(tree, fn.load(tmp_path / "ours", like=tree))
    assert_same(
        {"weight": flat["1.weight"], "bias": flat["1.bias"]},
        fn.load(tmp_path / "ours", at="module.1"),
    )
    save_file(flat, tmp_path / "theirs")
    assert_same(fn.tree.from_dotted(flat), fn.load(tmp_path / "theirs"))
    assert_same(flat, fn.load(tmp_path / "theirs", like=flat))


def test_tensors_that_share_memory_are_loaded_apart(tmp_path):
    base = torch.arange(20.0)
    tree = {"all": base, "same": base, "part": base[3:9], "rows": base.view(4, 5).T}
    fn.save(tmp_path / "t", tree)
    loaded = fn.load(tmp_path / "t", like=tree)
    assert_same(tree, loaded)
    loaded["all"].zero_()
    assert torch.equal(loaded["same"], base)


def test_conjugates_negatives_and_parameters_are_saved_by_value(tmp_path):
    z = torch.randn(3, 2, dtype=torch.complex128)
    tree = {
        "conj": z.conj(),
        "neg": z.conj().imag,
        "param": torch.nn.Parameter(torch.ones(2)),
        "complex64": z.to(torch.complex64).conj(),
    }
    fn.save(tmp_path / "t", tree, checksum=True)
    loaded = fn.load(tmp_path / "t", like=tree)
    assert all(torch.equal(loaded[name], tree[name]) for name in tree)
    assert not any(leaf.requires_grad for leaf in loaded.values())


def test_tensors_are_aligned_as_torchs_own_and_writing_to_them_leaves_the_file(tmp_path):
    tree = {str(n): torch.full((n,), n, dtype=torch.float64) for n in range(1, 40)}
    fn.save(tmp_path / "t", tree | {"b": torch.ones(3, dtype=torch.bool)})
    before = (tmp_path / "t").read_bytes()
    loaded = fn.load(tmp_path / "t")
    for leaf in loaded.values():
        assert leaf.data_ptr() % 64 == 0
        leaf.zero_()
    assert (tmp_path / "t").read_bytes() == before
    assert_same(tree["8"], fn.load(tmp_path / "t")["8"])


def test_a_loaded_tree_stays_when_its_file_is_replaced_or_removed(tmp_path):
    tree = {"w": torch.randn(1000, 64)}
    fn.save(tmp_path / "t", tree)
    loaded = fn.load(tmp_path / "t")
    fn.save(tmp_path / "t", {"w": torch.zeros(1000, 64)})
    assert_same(tree, loaded)
    (tmp_path / "t").unlink()
    assert_same(tree, loaded)


def test_a_loaded_tree_can_be_donated(tmp_path):
    step = fn.jit(lambda tree: fn.tree.map(lambda leaf: leaf * 2 + 1, tree), donate=0)
    tree = {"w": torch.randn(64, 16), "b": torch.randn(3)}
    expected = step(fn.tree.map(torch.clone, step(fn.tree.map(torch.clone, tree))))
    fn.save(tmp_path / "t", tree)
    before = (tmp_path / "t").read_bytes()
    assert_same(expected, step(step(fn.load(tmp_path / "t"))))
    assert (tmp_path / "t").read_bytes() == before


def test_a_donated_tensor_cannot_be_saved(tmp_path):
    tree = {"w": torch.ones(64, 16), "b": torch.ones(3)}
    fn.jit(lambda tree: fn.tree.map(lambda leaf: leaf * 2 + 1, tree), donate=0)(tree)
    with pytest.raises(RuntimeError, match="was donated"):
        fn.save(tmp_path / "t", tree)


@pytest.mark.cpu_only
def test_what_is_loaded_has_the_strides_of_like_so_that_a_run_goes_on_bit_for_bit(tmp_path):
    """Adam's kernel takes contiguous leaves alone, and its formula rounds otherwise."""
    optimizer = fn.adamw(0.1)
    params = {
        "rows": torch.randn(4, 3).T,
        "image": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "gaps": torch.randn(6)[::2],
    }
    step = params, optimizer.init_state(params)
    for number in range(2):
        params, opt_state = step
        grads = fn.tree.map(lambda leaf, n=number: (leaf * (n + 3)).sin(), params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        step = fn.apply_updates(params, updates), opt_state
        fn.save(tmp_path / "t", step)
        loaded = fn.load(tmp_path / "t", like=step)
        assert_same(loaded, step)
        pairs = zip(optree.tree_leaves(loaded), optree.tree_leaves(step), strict=True)
        assert all([a.stride() == b.stride() for a, b in pairs])


def test_like_may_lie_on_meta(tmp_path):
    net = fn.serial(fn.linear(3), fn.linear(2))
    params, _ = net.init(fn.key(0), torch.ones(1, 4))
    fn.save(tmp_path / "t", params)
    like, _ = net.init(fn.key(0), torch.ones(1, 4, device="meta"))
    assert_same(params, fn.load(tmp_path / "t", like=fn.tree.to_meta(like)))


def test_every_leaf_that_differs_is_named(tmp_path):
    fn.save(
        tmp_path / "t",
        {"a": torch.ones(2), "b": torch.ones(3), "c": 1, "d": "x", "e": torch.ones(1), "g": 2.0},
    )
    like = {
        "a": torch.ones(2),
        "b": torch.ones(4),
        "c": 1.0,
        "d": torch.ones(1),
        "e": torch.ones(1, dtype=torch.float64),
        "f": {"w": torch.ones(5)},
    }
    with pytest.raises(ValueError, match="is not like") as error:
        fn.load(tmp_path / "t", like=like)
    assert str(error.value).splitlines()[1:] == [
        "  b: float32 (3,) in the file, expected float32 (4,)",
        "  c: int in the file, expected float",
        "  d: str in the file, expected float32 (1,)",
        "  e: float32 (1,) in the file, expected float64 (1,)",
        "  f.w: not in the file, expected float32 (5,)",
        "  g: float in the file, not expected",
    ]
    assert str(error.value).startswith(f"load: {tmp_path}/t is not like the tree `like`, 6 leaves")


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"a": {"f": print}}, TypeError, "got builtin_function_or_method at 'a.f'"),
        ({"a": torch.ones(2).numpy()}, TypeError, "got ndarray at 'a'; make a tensor of it"),
        ({"a": torch.nn.ReLU()}, TypeError, r"got ReLU at 'a'; save its state_dict\(\)"),
        ({"a": 1j}, TypeError, "got complex at 'a'"),
        ({"a": torch.ones(2, 2).to_sparse()}, TypeError, "dense tensors, got a torch.sparse_coo"),
        ({"a": UNKNOWN}, TypeError, "no dtype for the torch.float4"),
        ({"a": torch.ones(2, device="meta")}, ValueError, "a tensor without any at 'a'"),
        ({"a": WITHOUT_MEMORY}, ValueError, "a tensor without any at 'a'"),
        ({"a": FAKE}, ValueError, "a tensor without any at 'a'"),
        ({"a.b": 1, "a": {"b": 2}}, ValueError, "two parts of the tree have the path 'a.b'"),
        ({"a.b": [], "a": {"b": 2}}, ValueError, "two parts of the tree have the path 'a.b'"),
        ({"a.b.c": 1, "a": 2}, ValueError, r"there are leaves below \['a'\]"),
        ({1: 1, "1": 2}, ValueError, "two parts of the tree have the path '1'"),
        ({(1, 2): 1}, TypeError, "keys that are strings or integers, got a tuple"),
        ({"__metadata__": torch.ones(1)}, ValueError, "must not be named '__metadata__'"),
        ({"\ud800": torch.ones(1)}, ValueError, "cannot be written as UTF-8"),
        ({"a": 10**5000}, ValueError, "the number at 'a' is too large"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.filterwarnings("ignore:.*invariant checks")
def test_what_cannot_be_saved_is_an_error_that_names_it(tmp_path, tree, error, message):
    (tmp_path / "t").write_text("old")
    with pytest.raises(error, match=rf"^save: .*{message}"):
        fn.save(tmp_path / "t", tree)
    assert [*tmp_path.iterdir()] == [tmp_path / "t"]
    assert (tmp_path / "t").read_text() == "old"


def test_a_tree_in_the_place_of_the_path_is_an_error(tmp_path):
    for call in (fn.save, lambda tree, path: fn.load(tree, like=path)):
        with pytest.raises(TypeError, match="expects a path as its first argument, got dict"):
            call({"w": torch.ones(1)}, tmp_path / "t")


def test_more_than_load_would_read_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"save: .*too many; make tensors of them"):
        fn.save(tmp_path / "t", {"text": "x" * 2**25})


@pytest.mark.parametrize("transform", [fn.vmap, fn.jit])
def test_save_refuses_to_run_within_a_transformation(tmp_path, transform):
    def step(x):
        fn.save(tmp_path / "t", {"x": x})
        return x

    with pytest.raises(ValueError, match="save: expects values to write"):
        transform(step)(torch.ones(2))


def test_importing_funcnet_or_loading_needs_no_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    fn.save(tmp_path / "t", {"w": torch.ones(1)})
    assert_same({"w": torch.ones(1)}, fn.load(tmp_path / "t"))


@pytest.mark.parametrize(
    "context", [torch.device("meta"), torch.inference_mode()], ids=["meta", "inference"]
)
def test_the_default_device_and_inference_mode_change_nothing(tmp_path, context):
    tree = {"w": torch.randn(64), "empty": torch.ones(0, 3), "b": torch.tensor([True, False])}
    with context:
        fn.save(tmp_path / "t", tree)
        loaded = fn.load(tmp_path / "t")
    assert_same(tree, loaded)
