"""Results of a run directory, for people: tables in the terminal, and a page."""
