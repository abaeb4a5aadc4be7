"""``make chaos``: a run whose workers, driver and object store are killed at random; see ``__main__``."""
