"""Other libraries that call attention, and how they are made to call ours. Each needs its own package."""
