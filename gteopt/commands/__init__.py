"""The functions behind the commands of gteopt."""
