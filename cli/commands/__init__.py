"""The commands of `slm`, one module each. `slm.cli.main` imports them on demand."""
