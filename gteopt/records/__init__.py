"""Everything that gteopt writes as JSON: frozen types with versioned schemas."""
