"""What a model is: architectures, stochastic layers, the draw engine, statistics, the artifact.

Modules are imported by name; this file stays empty so that `models.contract` costs nothing but pydantic.
"""
