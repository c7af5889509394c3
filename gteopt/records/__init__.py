"""What gteopt writes: every JSON as a frozen type with a versioned schema."""
