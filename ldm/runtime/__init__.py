"""How networks run, never what they compute: devices, dtypes, noise, and what to do when memory runs out."""
