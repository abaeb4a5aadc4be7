"""ptafuse around the stages: settings, run directories, runners, workflows, evaluation, analysis, reports, command line."""

import os

from stages.contract.threads import let_idle_threads_sleep

let_idle_threads_sleep(os.environ)  # here, because it must come before the first import of torch
