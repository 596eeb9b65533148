"""Composition engine: a base model, a pool of adapters and a router become one routed model."""
