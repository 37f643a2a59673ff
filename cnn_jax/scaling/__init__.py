"""What a training step costs on chips that are not here: compiled, read, and estimated."""
