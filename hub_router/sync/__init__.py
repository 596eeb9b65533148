"""Bringing repositories of the Hub and local folders into the catalog."""
