"""A table of what a model holds and computes, found on the meta device before anything runs."""

from funcnet.summaries.observe import (
    summary as summary,
)
from funcnet.summaries.table import (
    Row as Row,
    Summary as Summary,
)
