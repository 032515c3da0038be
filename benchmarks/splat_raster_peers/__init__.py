"""What the CPU rasteriser is held against, and the scenes that all of them draw."""
