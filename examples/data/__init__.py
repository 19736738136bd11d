"""Data sets the recipes train on, all in the layout of Pascal VOC."""
