"""Loops whose number of iterations is not known, and tables that they write row by row."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.control_flow import while_loop
from funcnet.indexing import dynamic_slice_in_dim, dynamic_update_slice_in_dim
from funcnet.runtime import has_one_value, is_transformed


def loop_with_values(
    condition: Callable[[Any], Tensor], body: Callable[[Any], Any], carry: Any
) -> Any:
    """A `while_loop`; on the meta device, where the condition has no value, one iteration."""
    if any([leaf.is_meta for leaf in tree.leaves(carry)]):
        return body(carry)
    return while_loop(condition, body, carry)


def rows_like(row: Tensor, count: int) -> Tensor:
    """A table of that many rows, whose values are to be written."""
    # Memory that nothing has been written to is not taken; of a transformed loop all is seen.
    make = row.new_zeros if is_transformed(row) else row.new_empty
    return make((count, *row.shape))


def written(rows: Tensor, row: Tensor, place: Tensor) -> Tensor:
    """The table with one row replaced, in its own memory where no transformation is at work.

    A compiled loop writes it in place too, if nothing reads the old table later.
    """
    if is_transformed(rows, row):
        return dynamic_update_slice_in_dim(rows, row[None], place)
    return rows.index_copy_(0, place[None], row[None])


def read_row(rows: Tensor, place: Tensor) -> Tensor:
    """One row, which is another one in each member under vmap."""
    return dynamic_slice_in_dim(rows, place, 1)[0]


def first_rows(rows: Tensor, count: Tensor) -> Tensor:
    """The rows that were written, where their number is known; else the whole table."""
    if is_transformed(rows) or not has_one_value(count):
        return rows
    return rows[: int(count)].clone(memory_format=torch.contiguous_format)
