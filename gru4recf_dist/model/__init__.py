"""GRU4RecF as plain modules: nothing here knows that it is distributed."""
