"""Training of the embedded default model: a DeepSeek-V3 network that two CPU cores can train."""
