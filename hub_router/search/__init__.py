"""Text to vector, the FAISS cache, and ranking of adapters."""
