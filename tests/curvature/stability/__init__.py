"""The stability limits of optimizers."""
