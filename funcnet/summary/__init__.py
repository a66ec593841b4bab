"""A table of what a model holds and computes, found on the meta device before anything runs."""

from funcnet.summary.observe import (
    summary as summary,
)
from funcnet.summary.table import (
    Row as Row,
    Summary as Summary,
)
