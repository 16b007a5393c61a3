"""r1-cluster: serves the DeepSeek-R1 family on a Ray cluster. This package knows no Ray."""

__version__ = "0.1.0"
