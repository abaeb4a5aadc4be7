"""The training stage: data, loss, loop, checkpoints and evaluation of the target model."""

import os

from stages.contract.threads import let_idle_threads_sleep

let_idle_threads_sleep(os.environ)  # here, because it must come before the first import of torch
