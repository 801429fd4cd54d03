"""One command a table or figure of the papers: `python -m benchmarks.NAME --help`."""
