"""Detectors the recipes train."""
