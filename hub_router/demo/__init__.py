"""The bundled demonstration: a loopback Hub and the main job run against it."""
