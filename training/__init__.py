"""Data in, artifact out. The main path is `pipeline.train`: load, split, fit, evaluate, publish.

Modules are imported by name; this file stays empty so that bad input is refused before TensorFlow is loaded.
"""
