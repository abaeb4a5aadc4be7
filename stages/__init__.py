"""What is computed: one folder per stage, what they know of models, the format on disk in which they meet, and statistics."""

import os

from stages.contract.threads import let_idle_threads_sleep

let_idle_threads_sleep(os.environ)  # here, because it must come before the first import of torch
