"""Model code that engines run. ``modeling_skv.py`` and ``mlx_skv.py`` travel with exported folders."""
