"""Data sets the recipes train on, in the layouts of Pascal VOC and COCO."""
