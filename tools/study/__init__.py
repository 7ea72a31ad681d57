"""Studies: grids of training runs with several seeds, and pages about them."""
