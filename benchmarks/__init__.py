"""Measurements of this machine: `make bench`. Nothing here is asserted; figures are to be compared within one run."""
