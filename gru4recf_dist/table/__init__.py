"""The sharded item table: rows, row-wise optimizers, item features, negative sampling."""
