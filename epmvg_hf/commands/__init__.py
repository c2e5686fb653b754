"""What the command `epmvg` does, one module for each of its commands. `epmvg_hf.cli` puts them together."""
