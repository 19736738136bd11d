"""Smaller dense detectors made from a dense one: what the paper's Fig. 6 sets beside selection."""
