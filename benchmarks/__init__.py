"""Scripts that print the tables of docs/: `python -m benchmarks.NAME` in the repository's root."""

import warnings

warnings.filterwarnings("ignore")  # libraries would print them between the rows of a table
