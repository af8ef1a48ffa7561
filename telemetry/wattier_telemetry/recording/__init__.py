"""What was recorded: `trace` is the file format, `recorder` writes it, `tally` and `card` make an energy card of it."""
