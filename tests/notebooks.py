"""Runs notebooks without Jupyter: ``python -m tests.notebooks FILE`` writes their outputs anew.

A cell's outputs are what it prints, the repr of its last expression, and its figures, small PNGs.
Nothing in the file depends on when and where it was run, but the times that a cell measures.
"""

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt


def read(path):
    return json.loads(Path(path).read_text())


def lines(text):
    """A text as nbformat has it: a list of lines, with their ends."""
    return text.splitlines(keepends=True)


def figures():
    """The open figures as outputs; they are closed."""
    found = []
    for number in plt.get_fignums():
        data = io.BytesIO()
        plt.figure(number).savefig(data, format="png", dpi=80, metadata={"Software": None})
        plt.close(number)
        image = {"image/png": base64.b64encode(data.getvalue()).decode()}
        found.append({"output_type": "display_data", "metadata": {}, "data": image})
    return found


def run_cell(source, namespace, count):
    """The outputs of a code cell."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), f"cell {count}", "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"cell {count}", "eval"), namespace)
    outputs = []
    if printed.getvalue():
        text = lines(printed.getvalue())
        outputs.append({"output_type": "stream", "name": "stdout", "text": text})
    if value is not None:
        data = {"text/plain": lines(repr(value))}
        result = {"output_type": "execute_result", "execution_count": count}
        outputs.append({**result, "metadata": {}, "data": data})
    return outputs + figures()


def run(notebook):
    """The notebook with new outputs, and the names that its cells have defined."""
    namespace, cells, count = {}, [], 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            outputs = run_cell("".join(cell["source"]), namespace, count)
            cell = {**cell, "execution_count": count, "outputs": outputs}
        cells.append(cell)
    return {**notebook, "cells": cells}, namespace


if __name__ == "__main__":
    for path in sys.argv[1:]:
        written, _ = run(read(path))
        Path(path).write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")
