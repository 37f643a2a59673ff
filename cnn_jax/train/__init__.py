"""Training: state, step, loop, metrics, checkpoint, record."""
