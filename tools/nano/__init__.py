"""The parts of the nano checkpoints: the tensors of the three models, and the layouts of their files."""
