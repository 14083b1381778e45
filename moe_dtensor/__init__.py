"""Dropless Mixture-of-Experts training on a (dp, pp, tp) DeviceMesh."""

__version__ = "0.1.0"
