"""What each command of gteopt does, as functions."""
