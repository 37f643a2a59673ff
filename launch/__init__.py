"""Entry points: absl flags in, plain errors and exit codes out."""
