"""All of GCL that does not ship with a checkpoint: data, training, evaluation, publishing and the `gcl` command."""
