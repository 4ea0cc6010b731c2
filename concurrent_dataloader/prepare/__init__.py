"""A data set before training: the commands of ``concurrent-dataloader VERB``."""
