"""The networks: configurations, layers, MLA, mixture of experts; built by range of layers."""
