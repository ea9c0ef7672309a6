"""Write the tables of docs/architectures.md: `PYTHONPATH=tests python -m architectures`."""

from architectures.table import HEADS, write

for table in HEADS:
    write(table)
