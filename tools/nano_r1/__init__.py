"""Training of the embedded default model: a DeepSeek-V3 architecture small enough to train on two CPU cores."""
