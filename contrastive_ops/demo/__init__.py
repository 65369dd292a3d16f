"""The main job on real input: code search over the Python on this machine. Run ``python -m contrastive_ops.demo``.

From top to bottom: pairs of a function and its docstring, the encoder, its training, what the terminal shows.
"""
