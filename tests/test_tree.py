"""Helpers for trees, and the flattener that remembers."""

from collections import OrderedDict, defaultdict, namedtuple

import optree
import pytest
import torch
from hypothesis import given, settings, strategies as st

import funcnet as fn
from funcnet import tree

W, B = torch.ones(2, 3), torch.zeros(2)
DEVICE = torch.get_default_device()


@pytest.mark.parametrize(
    ("path", "expected"), [((), ""), (("a",), "a"), (("a", "b"), "a.b"), ((0, "w", 1), "0.w.1")]
)
def test_path_string_is_dotted(path, expected):
    assert tree.path_string(path) == expected


DOTTED = {
    "empty": {},
    "flat": {"w": W},
    "nested": {"0": {"weight": W, "bias": B}, "1": {"x": {"y": B}}},
    "order kept": {"b": {"z": W, "a": B}, "a": {"c": W}},
}


@pytest.mark.parametrize("nested", DOTTED.values(), ids=DOTTED)
def test_from_dotted_is_the_inverse_of_to_dotted(nested):
    flat = tree.to_dotted(nested)
    back = tree.from_dotted(flat)
    assert optree.tree_structure(back) == optree.tree_structure(nested)
    assert all(a is b for a, b in zip(tree.leaves(back), tree.leaves(nested), strict=True))
    assert list(tree.to_dotted(back)) == list(flat)


def test_dotted_names_are_those_of_the_state_dict_in_its_order():
    net = fn.serial(fn.linear(4), fn.relu(), fn.serial(fn.linear(2), fn.linear(3)))
    params, _ = net.init(fn.key(0), torch.ones(1, 5))
    peer = torch.nn.Sequential(
        torch.nn.Linear(5, 4),
        torch.nn.ReLU(),
        torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Linear(2, 3)),
    )
    assert list(tree.to_dotted(params)) == list(peer.state_dict())
    assert optree.tree_structure(tree.from_dotted(peer.state_dict())) == optree.tree_structure(
        params
    )


def test_to_dotted_leaves_empty_children_out():
    assert tree.to_dotted({"a": {}, "b": {"c": {}}, "w": W}) == {"w": W}


@pytest.mark.parametrize("flat", [{"a": W, "a.b": B}, {"a.b": B, "a": W}])
def test_from_dotted_refuses_a_name_that_is_both_a_leaf_and_a_child(flat):
    with pytest.raises(ValueError, match="'a"):
        tree.from_dotted(flat)


def test_helpers_do_not_change_their_tree():
    nested = {"a": {"w": W}, "b": B}
    flat = {"a.w": W, "b": B}
    tree.to_dotted(nested)["c"] = W
    tree.from_dotted(flat)["a"]["v"] = W
    assert list(nested) == ["a", "b"]
    assert list(nested["a"]) == ["w"]
    assert list(flat) == ["a.w", "b"]


names = st.text("abcxyz01", min_size=1, max_size=3)
param_trees = st.recursive(
    st.builds(lambda: torch.zeros(1)),
    lambda children: st.dictionaries(names, children, min_size=1, max_size=3),
    max_leaves=8,
)
nested_dicts = st.dictionaries(names, param_trees, max_size=4)


@given(nested_dicts)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_dotted_round_trip_of_any_parameter_tree(nested):
    flat = tree.to_dotted(nested)
    assert sorted(flat) == sorted(tree.path_string(path) for path in optree.tree_paths(nested))
    back = tree.from_dotted(flat)
    assert optree.tree_structure(back) == optree.tree_structure(nested)
    assert all(a is b for a, b in zip(tree.leaves(back), tree.leaves(nested), strict=True))


def test_map_applies_leaf_by_leaf_and_refuses_another_structure():
    assert tree.map(lambda a, b: a + b, {"x": 1, "y": (2, 3)}, {"x": 10, "y": (20, 30)}) == {
        "x": 11,
        "y": (22, 33),
    }
    with pytest.raises(ValueError, match="y"):
        tree.map(lambda a, b: a + b, {"x": 1}, {"x": 1, "y": 2})


def test_leaves_are_in_the_order_of_the_names():
    assert tree.leaves({"b": 1, "a": (2, {"d": 3, "c": 4})}) == [2, 4, 3, 1]


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        ({}, {}),
        ({"a": 1, "b": {"c": 2}}, {"b": {"c": 5}, "a": 4}),
        ((1, [2]), (3, [4])),
        (1, 2),
    ],
)
def test_same_structures_pass(expected, found):
    assert tree.check_same_structure(expected, found, "grads") is None


@pytest.mark.parametrize(
    ("expected", "found", "message"),
    [
        ({"a": 1}, {}, "grads: the tree has no leaf 'a'"),
        ({}, {"a": 1}, "grads: the tree has 'a', which was not expected"),
        (
            {"a": {"w": 1}},
            {"a": {"v": 1}},
            "grads: the tree has no leaf 'a.w', and has 'a.v', which was not expected",
        ),
        (
            {"a": 1},
            {"a": {"w": 1}},
            "grads: the tree has no leaf 'a', and has 'a.w', which was not expected",
        ),
        ({"a": (1, 2)}, {"a": (1,)}, "grads: the tree has no leaf 'a.1'"),
        ({"a": 1}, {"a": None}, "grads: the tree has no leaf 'a'"),
        ({"a": 1, "b": 1, "c": 1}, {"c": 1}, "grads: the tree has no leaf 'a'"),
    ],
)
def test_another_structure_is_refused_with_the_first_path_that_differs(expected, found, message):
    with pytest.raises(ValueError, match=f"^{message.replace('.', '[.]')}$"):
        tree.check_same_structure(expected, found, "grads")


@pytest.mark.parametrize(
    ("expected", "found"),
    [({"a": (1, 2)}, {"a": [1, 2]}), ({"a": {}}, {}), ({0: 1}, {"0": 1}), ({"a": ()}, {"a": {}})],
)
def test_a_difference_without_a_path_is_refused_too(expected, found):
    with pytest.raises(ValueError, match=r"^grads: the tree is a PyTreeSpec.*expected PyTreeSpec"):
        tree.check_same_structure(expected, found, "grads")


def test_to_meta_keeps_shapes_and_dtypes_and_what_is_no_tensor():
    found = tree.to_meta({"w": W.half(), "n": (torch.tensor(1), 3, None)})
    assert found["w"].device.type == found["n"][0].device.type == "meta"
    assert (found["w"].shape, found["w"].dtype) == (W.shape, torch.float16)
    assert found["n"][0].dtype == torch.int64
    assert found["n"][1:] == (3, None)


def test_placeholder_has_shape_dtype_and_device_and_owns_one_element():
    found = tree.placeholder(
        {"w": torch.ones(1000, 7, dtype=torch.float64), "m": W.to("meta")}, DEVICE
    )
    assert (found["w"].shape, found["w"].dtype) == ((1000, 7), torch.float64)
    assert found["w"].untyped_storage().nbytes() == 8
    assert (found["m"].shape, found["m"].device) == (W.shape, DEVICE)


def test_device_of_is_that_of_the_first_tensor():
    assert tree.device_of({"a": 1, "b": (W.to("meta"), W)}).type == "meta"
    assert tree.device_of(W) == DEVICE
    for empty in ({}, (), None, {"a": 1}):
        with pytest.raises(ValueError, match="at least one tensor"):
            tree.device_of(empty)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (W, "float32 (2, 3)"),
        (torch.tensor(1), "int64 ()"),
        ((W, B), "(float32 (2, 3), float32 (2,))"),
        ({"a": W, "b": (B,)}, "{'a': float32 (2, 3), 'b': (float32 (2,))}"),
        ((), "()"),
        ({}, "{}"),
        (None, "NoneType"),
        (1.5, "float"),
        ("x", "str"),
        (W.to("meta"), "float32 (2, 3)"),
        (W.bfloat16(), "bfloat16 (2, 3)"),
    ],
)
def test_describe_shows_shapes_and_dtypes(value, expected):
    assert tree.describe(value) == expected


Pair = namedtuple("Pair", ["first", "second"])
Other = namedtuple("Other", ["first", "second"])


def tensors():
    return st.builds(lambda: torch.zeros(1))


def leaf_values():
    return st.one_of(tensors(), tensors(), st.integers(0, 3), st.none())


def containers(children):
    dicts = st.dictionaries(st.sampled_from("abc"), children, max_size=3)
    return st.one_of(
        dicts,
        dicts.map(lambda d: dict(reversed(d.items()))),
        dicts.map(OrderedDict),
        dicts.map(lambda d: defaultdict(int, d)),
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.tuples(children, children).map(lambda pair: Pair(*pair)),
        st.tuples(children, children).map(lambda pair: Other(*pair)),
    )


trees = st.recursive(leaf_values(), containers, max_leaves=5)


def assert_flattens_like_optree(flatten, value):
    found, treedef = flatten(value)
    leaves, expected = optree.tree_flatten(value)
    assert len(found) == len(leaves)
    assert all(a is b for a, b in zip(found, leaves, strict=True))
    assert treedef == expected
    back, again = treedef.unflatten(found), expected.unflatten(leaves)
    assert form(back) == form(again)


def form(value):
    """All that tells two trees apart but the leaves: types, and names in their order."""
    if isinstance(value, dict):
        return type(value), [(name, form(child)) for name, child in value.items()]
    if isinstance(value, (tuple, list)):
        return type(value), [form(child) for child in value]
    return type(value)


@given(st.lists(trees, min_size=1, max_size=6))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_flattener_equals_tree_flatten_for_any_sequence_of_trees(sequence):
    flatten = tree.Flattener()
    for value in sequence:
        assert_flattens_like_optree(flatten, value)
        assert_flattens_like_optree(flatten, value)


tensor_trees = st.recursive(tensors(), containers, max_leaves=4)


@given(tensor_trees, st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_flattener_sees_a_leaf_become_a_tree_and_back(value, data):
    flatten = tree.Flattener()
    assert_flattens_like_optree(flatten, value)
    leaves, treedef = optree.tree_flatten(value)
    grown = treedef.unflatten([data.draw(trees) for _ in leaves])
    assert_flattens_like_optree(flatten, grown)
    assert_flattens_like_optree(flatten, value)


SEQUENCES = {
    "names in another order": [{"a": W, "b": B}, {"b": B, "a": W}],
    "a dict, an OrderedDict, a defaultdict": [
        {"a": W},
        OrderedDict(a=W),
        defaultdict(int, a=W),
        {"a": W},
    ],
    "a tuple, a list, a namedtuple": [(W, B), [W, B], Pair(W, B), Other(W, B), (W, B)],
    "a leaf that becomes a tree": [{"a": W}, {"a": {"b": W}}, {"a": (W,)}, {"a": W}],
    "a leaf that becomes None": [{"a": W, "b": B}, {"a": W, "b": None}, {"a": W, "b": B}],
    "a leaf that becomes a number": [{"a": W}, {"a": 1}, {"a": W}],
    "a tree that becomes a leaf": [{"a": {"b": W}}, {"a": W}, W, {"a": {"b": W}}],
    "an empty tree": [{}, {"a": W}, {}, {"a": {}}, ()],
    "a parameter": [{"a": W}, {"a": torch.nn.Parameter(B)}, {"a": W}],
}


@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES)
def test_flattener_equals_tree_flatten_when_the_structure_changes(sequence):
    flatten = tree.Flattener()
    for value in sequence:
        assert_flattens_like_optree(flatten, value)


def test_flattener_sees_a_pullback_as_a_node():
    flatten = tree.Flattener()
    _, pullback, _ = fn.tanh().vjp({}, W)
    for value in ({"p": W}, {"p": pullback}, {"p": W}):
        assert_flattens_like_optree(flatten, value)


def test_leaves_like_come_in_the_order_of_the_treedef():
    leaves, treedef = optree.tree_flatten({"b": W, "a": {"c": B}})
    found = tree.leaves_like(
        [leaf.shape for leaf in leaves], treedef, {"b": W + 1, "a": {"c": B + 1}}, "params"
    )
    torch.testing.assert_close(found, [B + 1, W + 1])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": {"w": W}}, "params: the tree has no leaf 'b'"),
        ({"a": {"w": W}, "b": B, "c": B}, "params: the tree has 'c', which was not expected"),
        ({"a": W, "b": B}, "params: the tree has no leaf 'a[.]w'"),
        (
            {"a": {"w": {"x": W}}, "b": B},
            "params: the tree has no leaf 'a[.]w', and has 'a[.]w[.]x'",
        ),
        ({"a": {"w": W}, "b": (B, B)}, "params: the tree has no leaf 'b', and has 'b[.]0'"),
        ({"a": {"w": W}, "b": None}, "params: the tree has no leaf 'b'"),
        ({"a": {"w": W}, "b": {}}, "params: the tree has no leaf 'b'"),
        (None, "params: the tree has no leaf 'a[.]w'"),
        (W, "params: the tree has no leaf 'a[.]w'"),
        ([W, B], "params: the tree has no leaf 'a[.]w'"),
    ],
)
def test_leaves_like_refuse_another_structure_with_the_path(found, message):
    leaves, treedef = optree.tree_flatten({"a": {"w": W}, "b": B})
    with pytest.raises(ValueError, match=f"^{message}"):
        tree.leaves_like([leaf.shape for leaf in leaves], treedef, found, "params")


def test_leaves_like_refuse_another_shape_with_the_path():
    leaves, treedef = optree.tree_flatten({"a": {"w": W}, "b": B})
    message = rf"^grads: expects shape \({W.shape[0]}.*\) at 'a.w', got "
    with pytest.raises(ValueError, match=message):
        tree.leaves_like(
            [leaf.shape for leaf in leaves], treedef, {"a": {"w": torch.ones(())}, "b": B}, "grads"
        )


LAYERS = {"0": {"weight": W, "bias": B}, "10": {"weight": W}, "head": {"bias": B}}


@pytest.mark.parametrize(
    ("where", "paths"),
    [
        ("0", ["0.weight", "0.bias"]),
        ("0.bias", ["0.bias"]),
        (["0.bias", "head"], ["0.bias", "head.bias"]),
        ("*.bias", ["0.bias", "head.bias"]),
        ("*", ["0.weight", "0.bias", "10.weight", "head.bias"]),
        ("h*d", ["head.bias"]),
        ("*0", ["0.weight", "0.bias", "10.weight"]),
        (lambda path: path.endswith("weight"), ["0.weight", "10.weight"]),
    ],
)
def test_leaves_are_chosen_by_path_pattern_or_function(where, paths):
    assert tree.chosen_leaves(where, LAYERS) == paths


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("1", r"no leaf has the path '1', only \['0.weight', "),
        (["0", "*.scale"], r"no leaf has the path '\*.scale'"),
        (lambda path: False, "no leaf is chosen of"),
        ([], "no leaf is chosen of"),
    ],
)
def test_a_choice_that_fits_no_leaf_is_an_error(where, message):
    with pytest.raises(ValueError, match=message):
        tree.chosen_leaves(where, LAYERS)


NET = fn.serial(fn.linear(4), fn.relu(), fn.linear(2))
RUN = fn.init_train_state(NET, fn.adam(), fn.key(0), torch.ones(3, 5))


def test_paths_are_those_of_the_dotted_form_for_any_tree():
    found = dict(zip(tree.paths(RUN), tree.leaves(RUN), strict=True))
    flat = tree.to_dotted(RUN)
    assert {"params.2.bias", "key", "step"} <= flat.keys()
    assert found.keys() == flat.keys()
    assert all(found[path] is flat[path] for path in flat)


@given(trees)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_paths_and_dotted_form_agree(value):
    found = list(zip(tree.paths(value), tree.leaves(value), strict=True))
    assert {path: id(leaf) for path, leaf in found} == {
        path: id(leaf) for path, leaf in tree.to_dotted(value).items()
    }


def test_residuals_have_paths():
    _, pullback, _ = NET.vjp(RUN.params, torch.ones(3, 5))
    assert set(tree.paths(pullback)) == set(tree.to_dotted(pullback))
    assert tree.to_dotted({"a": None, "b": W}) == {"b": W}


def test_a_single_leaf_has_the_empty_path():
    assert tree.paths(W) == [""] == list(tree.to_dotted(W))


def test_select_gives_a_sparse_tree_with_the_paths_of_the_whole():
    found = tree.select(RUN, ["params.0", "opt_state.*.bias", "step"])
    assert found["params"] == {"0": RUN.params["0"]}
    assert list(tree.to_dotted(found))[:2] == ["params.0.weight", "params.0.bias"]
    assert all(leaf is tree.to_dotted(RUN)[path] for path, leaf in tree.to_dotted(found).items())
    assert tree.select(LAYERS, lambda path: path == "head.bias") == {"head": {"bias": B}}


@given(nested_dicts.filter(tree.leaves), st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_selected_leaves_put_back_give_the_tree(nested, data):
    some = data.draw(st.sets(st.sampled_from(tree.paths(nested)), min_size=1))
    chosen = tree.select(nested, some.__contains__)
    assert set(tree.paths(chosen)) == some
    ones = tree.map(torch.ones_like, chosen)
    found = tree.to_dotted(tree.replace(nested, ones))
    assert all(bool(leaf == (path in some)) for path, leaf in found.items())


def test_replace_keeps_the_type_of_the_tree_and_shares_the_other_leaves():
    found = tree.replace(RUN, {"params": {"0": {"bias": torch.ones(4)}}, "step": torch.tensor(7)})
    assert isinstance(found, fn.TrainState)
    assert found.step == 7
    assert found.params["0"]["bias"].tolist() == 4 * [1]
    assert found.params["0"]["weight"] is RUN.params["0"]["weight"]
    assert RUN.step == 0


def test_replace_by_a_function_of_the_leaf():
    found = tree.replace(LAYERS, "*.bias", torch.ones_like)
    assert found["0"]["bias"].sum() == found["head"]["bias"].sum() == 2
    assert found["10"]["weight"] is W


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"0.bias": W},), r"replace: expects float32 \(2,\) at '0.bias', got float32 \(2, 3\)"),
        (({"0.bias": B.double()},), "at '0.bias', got float64"),
        (({"0.bias": 1.0},), "at '0.bias', got float"),
        (({"0": B},), r"replace: no leaf has the path '0', only \['0.bias', "),
        (({"0.scale": B},), "no leaf has the path '0.scale'"),
        (("*.scale", torch.ones_like), r"no leaf has the path '\*.scale'"),
        (("0", torch.sum), r"expects float32 \(2,\) at '0.bias', got float32 \(\)"),
        (("0.bias",), "expects a dict from paths to leaves, or a choice of leaves and a function"),
    ],
)
def test_replace_refuses_what_does_not_fit(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tree.replace(LAYERS, *arguments)


def test_replace_without_a_check_takes_another_shape():
    assert tree.replace(LAYERS, {"0.bias": W}, check=False)["0"]["bias"] is W


def test_a_long_list_of_paths_is_cut_short():
    many = {str(i): W for i in range(50)}
    with pytest.raises(ValueError, match=r"'19'\] and 30 more$"):
        tree.select(many, "x")


def test_count_and_bytes_are_of_the_tensors():
    mixed = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": (torch.tensor(True), 3, None)}
    assert (tree.count(mixed), tree.bytes(mixed)) == (7, 13)
    assert (tree.count({}), tree.bytes(())) == (0, 0)
    assert tree.count(RUN.params) == 5 * 4 + 4 + 4 * 2 + 2


def test_norms_are_those_of_torch_by_path():
    grads = {"w": torch.randn(3, 4), "b": (torch.randn(()), torch.randn(0), torch.arange(3))}
    found = tree.norms(grads)
    assert list(found) == ["w", "b.0", "b.1"]
    torch.testing.assert_close(found["w"], grads["w"].norm())
    floating = [grads["w"], *grads["b"][:2]]
    torch.testing.assert_close(tree.global_norm(grads), torch.nn.utils.get_total_norm(floating))
    assert tree.global_norm({}) == 0


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.bfloat16], torch.float32),
        ([torch.float16, torch.float64], torch.float64),
        ([torch.complex64], torch.float32),
    ],
)
def test_norms_are_computed_in_float32_at_least(dtypes, expected):
    leaves = [torch.full((10_000,), 0.1, dtype=dtype) for dtype in dtypes]
    exact = sum(float(leaf.to(torch.complex128).abs().square().sum()) for leaf in leaves) ** 0.5
    found = tree.global_norm(leaves)
    assert found.dtype == expected
    assert found.item() == pytest.approx(exact, rel=1e-4)


def test_norms_and_counts_run_under_vmap_and_jit():
    members = {"w": torch.randn(3, 2, 5), "b": torch.randn(3, 4)}

    def measured(params):
        return (
            tree.norms(params),
            tree.global_norm(params),
            params["b"].new_full((), tree.count(params)),
        )

    found = fn.vmap(measured)(members)
    solo = [measured(tree.map(lambda leaf, i=i: leaf[i], members)) for i in range(3)]
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *solo)
    torch.testing.assert_close(found, stacked)
    assert found[2].tolist() == [14, 14, 14]
    first = tree.map(lambda leaf: leaf[0], members)
    torch.testing.assert_close(fn.jit(measured)(first), solo[0])


FIRST = {"0": {"weight": W, "bias": B}, "n": torch.tensor(3)}


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({}, None),
        ({"0.weight": W.T}, r"0.weight: float32 (2, 3) and float32 (3, 2)"),
        ({"0.bias": B.double()}, "0.bias: float32 (2,) and float64 (2,)"),
        ({"n": torch.tensor(4)}, "n: 3 and 4"),
        (
            {"0.bias": torch.tensor([0, 1e-8])},
            "0.bias[1]: 0 and 9.99999994e-09; 1 of 2 numbers differ",
        ),
        ({"0.weight": 0 * W, "0.bias": B + 1}, "0.weight[0, 0]: 1 and 0; 6 of 6 numbers differ"),
        ({"n": 3}, "n: int64 () and int"),
    ],
)
def test_compare_names_the_first_difference(changed, difference):
    other = tree.replace(FIRST, changed, check=False)
    assert tree.compare(FIRST, other) == difference


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        (FIRST, {"0": {"weight": W}, "n": W}, "b: the tree has no leaf '0.bias'"),
        ({"a": (1, 2)}, {"a": (1, 3)}, "a.1: 2 and 3"),
        (W, W + 1, "[0, 0]: 1 and 2; 6 of 6 numbers differ"),
        (1, 2, "1 and 2"),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), None),
        (torch.tensor([True]), torch.tensor([False]), "[0]: True and False; 1 of 1 numbers differ"),
        (torch.ones(0, 3), torch.ones(0, 3), None),
        ({}, {}, None),
        (W.to("meta"), W, None),
        (B.double()[0] + 1, B.double()[0] + 1 + 2.0**-52, "1 and 1.0000000000000002"),
    ],
)  # fmt: skip
def test_compare_of_any_trees(a, b, difference):
    assert tree.compare(a, b) == difference


def test_compare_with_tolerances():
    a, b = {"w": torch.tensor([1.0, 100.0])}, {"w": torch.tensor([1.001, 100.1])}
    assert tree.compare(a, b, rtol=2e-3) is None
    assert tree.compare(a, b, atol=0.01).startswith("w[1]: 100 and 100.099998; 1 of 2")


def test_compare_of_two_runs_tells_where_they_part():
    step = fn.train_step(NET, fn.mse(), fn.adam())
    batch = torch.ones(3, 5), torch.ones(3, 2)
    one, other = step(RUN, batch)[0], step(RUN, batch)[0]
    assert tree.compare(one, other) is None
    assert tree.compare(one, RUN).startswith("params.0.weight[")
    assert tree.compare(one, one._replace(step=RUN.step)) == "step: 1 and 0"
