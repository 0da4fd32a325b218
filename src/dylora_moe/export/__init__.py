"""A trained mixture -> what other programs read: PEFT adapters, merged models, GGUF, a repository of the hub."""
