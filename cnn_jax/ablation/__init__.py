"""Ablations: arms that differ from a baseline, run over seeds, compared in pairs, reported."""
