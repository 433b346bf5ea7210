"""What a training run will need, before it runs: legal layouts, memory of each process, seconds of a step.

Nothing here holds weights: parts of the real model run on fake tensors, the rest is arithmetic.
"""
