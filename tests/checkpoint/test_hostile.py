"""`load` of files that are damaged, of another kind, or forged."""

import io
import json
import pickle
import struct
import zipfile

import pytest
import torch

import funcnet as fn
from tests import fuzz_checkpoint

pytestmark = pytest.mark.cpu_only

W = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file(header, data=bytes(8), length=None):
    """A file of a header, a dict or JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def described(**description):
    """A file of the tensor w with a description as `save` writes it."""
    text = json.dumps({"version": 1} | description)
    return file({"__metadata__": {"funcnet": text}, "w": W})


def archive():
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as zipped:
        zipped.writestr("data.pkl", pickle.dumps(print))
    return data.getvalue()


TWICE = b'{"w":%b,"w":%b}' % ((json.dumps(W).encode(),) * 2)
HOSTILE = {
    "an empty file": (b"", "another kind, or cut"),
    "seven bytes": (b"1234567", "another kind, or cut"),
    "a pickle": (pickle.dumps({"w": print}), "another kind, or cut; a pickle, .* torch.load"),
    "a zip": (archive(), "another kind, or cut; a pickle, .* torch.load"),
    "a header longer than the file": (file({"w": W}, length=2**63), "another kind, or cut"),
    "a header of no length": (file(b""), "another kind, or cut"),
    "a header that is too long": (file(b" " * (2**24 + 1)), "a header of 16777217 bytes"),
    "no JSON": (file(b"{'w': 1}"), "the header is no JSON"),
    "no UTF-8": (file(b'{"\xff": 1}'), "the header is not UTF-8"),
    "a list": (file(b"[]"), "the header is a list"),
    "brackets without end": (file(b"[" * 10**6), "the header is nested too deeply"),
    "dicts without end": (file(b'{"a":' * 10**6), "the header is nested too deeply"),
    "a number without end": (file(b'{"w":' + b"1" * 10**5 + b"}"), "limit"),
    "a name twice": (file(TWICE), "a name is there twice"),
    "cut data": (file({"w": W}, bytes(7)), "where the tensors end"),
    "more data": (file({"w": W}, bytes(9)), "where the tensors end"),
    "overlapping tensors": (file({"w": W, "v": W}), "tensors overlap"),
    "a hole": (file({"w": W | {"data_offsets": [8, 16]}}, bytes(16)), "holes between"),
    "a negative shape": (file({"w": W | {"shape": [-1, -2]}}), "no shape and place"),
    "a negative offset": (file({"w": W | {"data_offsets": [-8, 0]}}), "no shape and place"),
    "a reversed place": (file({"w": W | {"data_offsets": [8, 0]}}), "takes -8 bytes"),
    "a broken number": (file({"w": W | {"shape": [2.0]}}), "no shape and place"),
    "a number that is a bool": (file({"w": W | {"shape": [2, True]}}), "no shape and place"),
    "a shape that overflows": (file({"w": W | {"shape": [2**62, 2**62, 2]}}), "takes 8 bytes"),
    "an empty one that overflows": (
        file({"w": W | {"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}, b""),
        "takes 0 bytes",
    ),
    "too many dimensions": (file({"w": W | {"shape": [1] * 100 + [2]}}), "no shape and place"),
    "another size": (file({"w": W | {"shape": [3]}}), "takes 8 bytes"),
    "an unknown dtype": (file({"w": W | {"dtype": "F31"}}), "has the dtype 'F31'"),
    "a dtype that is a list": (file({"w": W | {"dtype": ["F32"]}}), "no dtype, shape and place"),
    "a field too many": (file({"w": W | {"x": 1}}), "no dtype, shape and place"),
    "a field too few": (file({"w": {"dtype": "F32"}}), "no dtype, shape and place"),
    "metadata of numbers": (file({"__metadata__": {"a": 1}, "w": W}), "metadata are not texts"),
    "a leaf below a leaf": (
        file({"w": W, "w.v": W | {"shape": [0], "data_offsets": [0, 0]}}),
        "lies below 'w', which is a leaf",
    ),
    "a newer version": (described(version=2), "version 2, not 1; install a newer funcnet"),
    "a version that is a list": (described(version=[]), r"version \[\], not 1"),
    "a description of another kind": (described(pickles={}), "has \\['pickles'\\]"),
    "a value that is a list": (described(values={"v": [1]}), "values are not"),
    "an unknown kind of node": (described(nodes={"v": "module"}), r"the kind \['module'\]"),
    "a node that is a leaf": (described(nodes={"w": "list"}), "a leaf is described as a node"),
    "dots that are a text": (described(dots={"w": "1"}), "dots are not"),
    "dots that are no count": (described(dots={"w": -1}), "dots are not counts"),
    "a value at a tensor's path": (described(values={"w": 1}), "a leaf is there twice"),
    "a value below a tensor": (described(values={"w.v": 1}), "'w'"),
    "a path without end": (described(values={"a." * 2**22: 1}), "parts, more than"),
    "a deep path": (described(values={"a." * 300: 1}), "deeper than 256 dicts; give `like`"),
    "no complex number": (described(dtypes={"w": "complex128"}), "is stored as 'complex128'"),
    "another dtype": (described(dtypes={"w": "object"}), "is stored as 'object'"),
    "another checksum": (described(crc32={"w": 1}), "the bytes of 'w' are not those"),
    "a score that is a text": (described(score="1"), "the score is no number"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_no_checkpoint_is_an_error_that_says_why(tmp_path, name):
    data, message = HOSTILE[name]
    path = tmp_path / "t.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"^load: .*t.safetensors .*: .*{message}"):
        fn.load(path)
    with pytest.raises(ValueError, match=r"^load: "):
        fn.load(path, like={"w": torch.ones(4)})


INDICES = {
    "a path": ({"w": "../secret.safetensors"}, "which is no file's name"),
    "a path from the root": ({"w": "/etc/passwd"}, "which is no file's name"),
    "a path of another system": ({"w": "..\\secret"}, "which is no file's name"),
    "the folder": ({"w": "."}, "which is no file's name"),
    "the folder above": ({"w": ".."}, "which is no file's name"),
    "no name": ({"w": ""}, "which is no file's name"),
    "a zero byte": ({"w": "t\0"}, "which is no file's name"),
    "a number": ({"w": 1}, "which is no file's name"),
    "a file that is missing": ({"w": "missing"}, "'missing', of the index: No such file"),
    "a name without end": ({"w": "a" * 1000}, "of the index: File name too long"),
    "a tensor that is missing": ({"v": "shard"}, "'v' is not in 'shard'"),
    "itself": ({"w": "t.safetensors.index.json"}, "another kind"),
    "a list": ([], "no weight_map"),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_does_not_reach_out_of_its_folder(tmp_path, name):
    places, message = INDICES[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    fn.save(tmp_path / "secret.safetensors", {"w": torch.ones(2)})
    fn.save(folder / "shard", {"w": torch.ones(2)})
    (folder / "t.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=rf"^load: .*index.json .*{message}"):
        fn.load(folder / "t.safetensors")


def test_bytes_that_are_no_bool_become_one(tmp_path):
    header = {"w": {"dtype": "BOOL", "shape": [4], "data_offsets": [0, 4]}}
    (tmp_path / "t").write_bytes(file(header, bytes([0, 1, 2, 255])))
    assert fn.load(tmp_path / "t")["w"].view(torch.uint8).tolist() == [0, 1, 1, 1]


def test_forged_files_are_refused_or_loaded(tmp_path):
    outcomes = {"loaded": 0, "refused": 0}
    for number in range(400):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcomes[fuzz_checkpoint.check(1, number, folder)] += 1
    assert min(outcomes.values()) > 40
