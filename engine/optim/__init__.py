"""Optimizers: which parameters are treated alike, and the learning rate of every step."""
