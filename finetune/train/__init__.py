"""The training loop: state, step, loss, optimizers and schedules."""
