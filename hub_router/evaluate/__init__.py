"""Accuracy of routed models, per task and per method."""
