"""What this machine can and cannot do: one function a check, of data that somebody looked up."""
