"""Routing methods, one per file, behind the seam of ``base.py``."""
