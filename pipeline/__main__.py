"""``python -m pipeline``: the command ``ptafuse`` of a checkout."""

from pipeline.cli.main import main

main()
