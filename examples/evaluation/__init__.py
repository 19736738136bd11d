"""How the recipes score detections."""
