"""Reading LoRA adapters from disk, stacking them into banks, and the spectrum of their updates."""
