"""Tools around training: speed, traces, prediction, export, heat maps, self-check."""
