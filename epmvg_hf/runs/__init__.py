"""What a training or an evaluation from the command line does. `epmvg_hf.commands` starts it."""
