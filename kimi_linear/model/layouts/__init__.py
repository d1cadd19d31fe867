"""Checkpoints in the layouts of others: what each calls a tensor, what is wrong with a folder, and the way between them."""
