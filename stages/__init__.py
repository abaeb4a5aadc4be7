"""Stages, one folder each; with the models that they use, the format on disk in which they meet, and statistics."""

import os

from stages.contract.threads import let_idle_threads_sleep

let_idle_threads_sleep(os.environ)  # here, because it must come before the first import of torch
