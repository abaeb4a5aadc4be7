"""The training stage: data, loss, loop, checkpoints and evaluation of the target model."""
