"""The generator of the stories and instructions that ship in `slm.core.sample`; nothing else imports it."""
