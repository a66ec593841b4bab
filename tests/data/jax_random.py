"""Print what jax.random draws, as JSON, for tests/test_random.py to compare with.

Run it in an environment with jax, from the root of the repository:

    python tests/data/jax_random.py > tests/data/jax_random.json

Every case is ``{"key": [k0, k1], arguments, "values": what jax gave}``. Floats are written so that
they are read back exactly; 64-bit words are written as the int64 with the same bits. Of a large
draw only a checksum and the words around the ends of its blocks are kept.
"""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np

SEEDS = [0, 1, 2, 42, 1234567, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**40 + 3, -1, -2]
FOLDED = [0, 1, 7, 65536, 2**31 - 1, 2**31, 2**32 - 1]
SHAPES = [(), (0,), (1,), (3,), (7,), (2, 3, 4), (3, 0, 2)]
LARGE = 200_000
LARGE_ENTRIES = [0, 1, 65535, 65536, 65537, 131071, 131072, 196608, 199999]
DRAW_KEYS = [(0, 0), (0, 42), (2**32 - 1, 2**31), (123456789, 3735928559)]


def wrapped(words):
    return jax.random.wrap_key_data(jnp.array(words, dtype=jnp.uint32))


def words_of(key):
    return np.asarray(jax.random.key_data(key)).astype(np.int64).tolist()


def numbers(array):
    """Plain numbers: half precision is exact in float32, and uint64 is put into int64."""
    array = np.asarray(array)
    if array.dtype == np.uint64:
        return array.view(np.int64).tolist()
    if array.dtype.kind in "iub":
        return array.tolist()
    return array.astype(np.float64).tolist()


def keys():
    for seed in SEEDS:
        # A Python integer beyond int32 keeps its low word alone where jax has no 64-bit mode.
        yield {"seed": seed, "values": words_of(jax.random.key(np.int64(seed)))}


def splits():
    for words in DRAW_KEYS:
        for n in (1, 2, 5, 100):
            yield {"key": words, "n": n, "values": words_of(jax.random.split(wrapped(words), n))}


def folds():
    for words in DRAW_KEYS:
        for data in FOLDED:
            folded = jax.random.fold_in(wrapped(words), np.uint32(data))
            yield {"key": words, "data": data, "values": words_of(folded)}


def chains():
    """A key after ``key``, ``fold_in``, the last of ``split``, ``fold_in`` and ``split`` again."""
    for seed in SEEDS:
        key = jax.random.fold_in(jax.random.key(np.int64(seed)), np.uint32(2**31 + 7))
        key = jax.random.fold_in(jax.random.split(key, 5)[4], 3)
        yield {"seed": seed, "values": words_of(jax.random.split(key, 3)[1])}


def bits():
    dtypes = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}
    for words in DRAW_KEYS:
        for width, dtype in dtypes.items():
            for shape in SHAPES:
                drawn = jax.random.bits(wrapped(words), shape, dtype)
                yield {"key": words, "width": width, "shape": shape, "values": numbers(drawn)}


def large_bits():
    for width, dtype in {32: jnp.uint32, 64: jnp.uint64, 8: jnp.uint8}.items():
        drawn = np.asarray(jax.random.bits(wrapped((7, 11)), (LARGE,), dtype))
        as_int64 = (drawn.view(np.int64) if width == 64 else drawn.astype(np.int64)).astype("<i8")
        yield {
            "key": (7, 11),
            "width": width,
            "shape": (LARGE,),
            "crc32": zlib.crc32(as_int64.tobytes()),
            "entries": LARGE_ENTRIES,
            "values": as_int64[LARGE_ENTRIES].tolist(),
        }


def uniforms():
    ranges = [(0.0, 1.0), (-1.0, 1.0), (0.1, 0.3), (5.0, 1e4), (-2.5, -2.25)]
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        for words in DRAW_KEYS:
            for low, high in ranges:
                drawn = jax.random.uniform(wrapped(words), (4, 5), jnp.dtype(dtype), low, high)
                yield {
                    "key": words,
                    "dtype": dtype,
                    "shape": (4, 5),
                    "minval": low,
                    "maxval": high,
                    "values": numbers(drawn),
                }


def normals():
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        for words in DRAW_KEYS:
            drawn = jax.random.normal(wrapped(words), (40,), jnp.dtype(dtype))
            yield {"key": words, "dtype": dtype, "shape": (40,), "values": numbers(drawn)}


def truncated_normals():
    bounds = [(-2.0, 2.0), (-1.0, 0.5), (0.25, 0.5), (-3.0, 100.0), (-100.0, -1.0)]
    for dtype in ("float32", "float64"):
        for words in DRAW_KEYS:
            for low, high in bounds:
                drawn = jax.random.truncated_normal(
                    wrapped(words), low, high, (20,), jnp.dtype(dtype)
                )
                yield {
                    "key": words,
                    "dtype": dtype,
                    "lower": low,
                    "upper": high,
                    "shape": (20,),
                    "values": numbers(drawn),
                }


def bernoullis():
    for words in DRAW_KEYS:
        for p in (0.0, 0.1, 0.5, 0.9, 1.0):
            drawn = jax.random.bernoulli(wrapped(words), jnp.float32(p), (50,))
            yield {"key": words, "p": p, "values": numbers(drawn)}


def randints():
    ranges = {
        "int32": [(0, 10), (-5, 5), (3, 4), (5, 5), (9, 2), (0, 1000), (-(2**15), 2**15)],
        "int64": [(0, 10), (-5, 5), (3, 4), (5, 5), (9, 2), (0, 2**16 + 1), (0, 10**6 + 3)],
    }
    ranges["int32"] += [(0, 65535), (0, 65536), (0, 65537), (0, 10**6 + 3)]
    ranges["int32"] += [(0, 2**31 - 1), (-(2**30), 2**30), (-(2**31), -(2**31) + 9)]
    ranges["int64"] += [(-(2**30), 2**30), (2**40, 2**40 + 2**31 - 1), (-(2**62), -(2**62) + 7)]
    for dtype, pairs in ranges.items():
        for words in DRAW_KEYS:
            for low, high in pairs:
                drawn = jax.random.randint(wrapped(words), (3, 4), low, high, jnp.dtype(dtype))
                yield {
                    "key": words,
                    "dtype": dtype,
                    "shape": (3, 4),
                    "minval": low,
                    "maxval": high,
                    "values": numbers(drawn),
                }


def permutations():
    for words in DRAW_KEYS:
        for n in (0, 1, 2, 5, 1000):
            drawn = jax.random.permutation(wrapped(words), n)
            yield {"key": words, "n": n, "values": numbers(drawn)}
    # Beyond 1625 elements jax sorts twice, beyond 2642245 three times.
    drawn = jax.random.permutation(wrapped((0, 42)), 3000)
    yield {"key": (0, 42), "n": 3000, "values": numbers(drawn)}


def array_permutations():
    for words in DRAW_KEYS:
        for shape, axis in (((6,), 0), ((5, 3), 0), ((2, 7), 1), ((2, 4, 3), -2)):
            array = jnp.arange(np.prod(shape)).reshape(shape)
            drawn = jax.random.permutation(wrapped(words), array, axis)
            yield {"key": words, "shape": shape, "axis": axis, "values": numbers(drawn)}


def categoricals():
    logits = np.round(np.linspace(-3.0, 3.0, 24).reshape(2, 3, 4) ** 2 % 5.0, 3)
    for dtype in ("float32", "float64"):
        for words in DRAW_KEYS:
            for axis, shape in (
                (-1, None),
                (0, None),
                (1, None),
                (-2, (5, 2, 4)),
                (2, (2, 6, 2, 3)),
            ):
                drawn = jax.random.categorical(
                    wrapped(words), jnp.asarray(logits, jnp.dtype(dtype)), axis, shape
                )
                yield {
                    "key": words,
                    "dtype": dtype,
                    "logits": logits.tolist(),
                    "axis": axis,
                    "shape": shape,
                    "values": numbers(drawn),
                }


TABLES = [
    splits,
    folds,
    bits,
    large_bits,
    uniforms,
    normals,
    truncated_normals,
    bernoullis,
    randints,
    permutations,
    array_permutations,
    categoricals,
]


def main():
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_threefry_partitionable", True)
    # The two that make keys of seeds do so as jax does by default, the draws with 64-bit types.
    vectors = {"jax": jax.__version__, "keys": list(keys()), "chains": list(chains())}
    jax.config.update("jax_enable_x64", True)
    vectors |= {table.__name__: list(table()) for table in TABLES}
    tables = []
    for name, cases in vectors.items():
        rows = ",\n".join(json.dumps(case) for case in cases) if isinstance(cases, list) else ""
        tables.append(f"{json.dumps(name)}: " + (f"[\n{rows}\n]" if rows else json.dumps(cases)))
    print("{\n" + ",\n".join(tables) + "\n}")


if __name__ == "__main__":
    main()
