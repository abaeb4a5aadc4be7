"""ptafuse around the stages: settings, run directories, runners, workflows, evaluation, analysis, reports, command line."""
