"""The command line, and nothing else: commands open a run, call what computes or reads, and print."""
