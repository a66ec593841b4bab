"""The rows of all tables of optimizers: `CASES` of each file cases_*.py in this folder, by name."""

import importlib
from pathlib import Path

TABLES = {
    path.stem: importlib.import_module(f"optimizers.{path.stem}").CASES
    for path in sorted(Path(__file__).parent.glob("cases_*.py"))
}
CASES = {name: case for table in TABLES.values() for name, case in table.items()}
